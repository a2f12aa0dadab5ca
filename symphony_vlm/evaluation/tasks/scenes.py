"""The built-in scenes: the test split of a folder of scenes, or one drawn for the occasion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from symphony_vlm.data.scenes import generate_scenes
from symphony_vlm.evaluation.task import EvaluationItem, Task
from symphony_vlm.evaluation.tasks.short_answer import load_items, score

__all__ = ["TASK"]

TEST_PICTURES = 400


def _load(data: Path | None, image_folder: Path | None, scratch: Path, seed: int) -> Sequence[EvaluationItem]:
    if data is None:
        # A test picture depends on the seed and its index alone, so this is the quickstart's test split.
        data = generate_scenes(scratch / "scenes", train=1, test=TEST_PICTURES, seed=seed).test_json
    elif data.is_dir():
        data = data / "test.json"
    return load_items(data, image_folder)


TASK = Task(name="scenes", split="test", load=_load, score=score)
