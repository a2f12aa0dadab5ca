"""The command line. Heavy libraries are imported inside the commands, so that ``--help`` answers at once.

Each file holds the commands of one subject; importing it adds them to the application, in the order of ``--help``.
"""

from symphony_vlm.cli import (  # noqa: F401, I001
    training,
    evaluation,
    corruption,
    perplexity,
    scoring,
    serving,
    study,
    data,
    recipes,
    parameters,
    doctor,
)
from symphony_vlm.cli.application import app
from symphony_vlm.cli.entry import main

__all__ = ["app", "main"]
