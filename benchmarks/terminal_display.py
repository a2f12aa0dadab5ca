"""Draws docs/images/monitoring.svg: the display of a real, small training run as it stands after its last step.

Usage: python -m benchmarks.terminal_display [FOLDER] [WIDTH]; FOLDER gets the run and the picture.
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from symphony_vlm.config.loading import load_recipe
from symphony_vlm.training.progress import ProgressDisplay
from symphony_vlm.training.run import train

SETTINGS = [
    "model.language.architecture.num_hidden_layers=4",
    "model.moe.num_experts=8",
    "stages.instruct.max_steps=120",
    "stages.instruct.log_steps=10",
    "monitor.peak_tflops=0.1",
]
"""With a peak, so that the picture has a utilisation too; that of a CPU is not known."""


def main(folder: Path, width: int) -> None:
    """Runs the recipe ``tiny`` with a longer last stage and draws its display at step 90."""
    kept: list[str] = []
    original = ProgressDisplay.on_step_end

    def on_step_end(self: ProgressDisplay, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if self._stage == "instruct" and state.global_step == 91:
            console = Console(record=True, width=width, force_terminal=True, file=io.StringIO())
            console.print(self)
            kept.append(console.export_svg(title="symphony-vlm train"))

    ProgressDisplay.on_step_end = on_step_end  # type: ignore[method-assign]
    train(load_recipe("tiny", SETTINGS), folder, console=Console(stderr=True))
    # Without the fonts that the picture would fetch from elsewhere: the reader's own are as good.
    picture = re.sub(r"@font-face \{.*?\}\n", "", kept[0], flags=re.DOTALL)
    (folder / "monitoring.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main(
        Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()),
        int(sys.argv[2]) if len(sys.argv) > 2 else 90,
    )
