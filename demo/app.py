"""Entry point of a Hugging Face Space, and of ``python -m demo.app --model DIR``.

A Space sets ``SYMPHONY_VLM_MODEL`` (and ``SYMPHONY_VLM_COMPARE``) to a folder or a hub name, and the address through
gradio's own variables. The page is that of ``symphony-vlm demo``.
"""

from __future__ import annotations

import argparse
import os

from symphony_vlm.cli.plugins import import_plugins
from symphony_vlm.errors import InputError
from symphony_vlm.serving.gradio_app import launch


def main() -> None:
    """Reads the settings and opens the page."""
    parser = argparse.ArgumentParser(prog="python -m demo.app", description="Open a chat page in the browser.")
    parser.add_argument("--model", default=os.environ.get("SYMPHONY_VLM_MODEL"), help="folder or hub name")
    parser.add_argument("--compare", default=os.environ.get("SYMPHONY_VLM_COMPARE"), help="a second model")
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
    parser.add_argument("--port", default=os.environ.get("GRADIO_SERVER_PORT", "7860"), type=int)
    arguments = parser.parse_args()
    if not arguments.model:
        parser.error("no model: give --model DIR or set SYMPHONY_VLM_MODEL")
    try:
        import_plugins()
        launch(arguments.model, arguments.compare, host=arguments.host, port=arguments.port)
    except InputError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
