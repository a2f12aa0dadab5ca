"""Commands about data: generated scenes and the check before training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from symphony_vlm.cli.application import Json, data_app, finish

__all__: list[str] = []


@data_app.command("scenes")
def data_scenes(
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    train: Annotated[int, typer.Option(help="Training pictures.")] = 4000,
    test: Annotated[int, typer.Option(help="Test pictures.")] = 400,
    seed: Annotated[int, typer.Option(help="Equal arguments give equal bytes.")] = 0,
    image_size: Annotated[int, typer.Option(help="Side in pixels.")] = 64,
    json_: Json = False,
) -> None:
    """Draw the built-in scenes as LLaVA JSON and PNG.

    Example: symphony-vlm data scenes --output scenes --train 1000 --test 100
    """
    from symphony_vlm.data.scenes import generate_scenes

    made = generate_scenes(output, train=train, test=test, seed=seed, image_size=image_size)
    summary = {"output": str(output), "train": made.train_images, "test": made.test_images, "sha256": made.sha256}
    finish(summary, json_, f"{made.train_images} training and {made.test_images} test pictures in {output}")
