"""One run of the recipe ``tiny`` that the tests of training share, and short runs that start from its models."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from symphony_vlm.config.loading import load_recipe
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.training.run import TrainResult, train


@dataclass(frozen=True)
class FinishedRun:
    """A run and how it went."""

    folder: Path
    result: TrainResult
    seconds: float

    def log(self, stage: str | None = None) -> list[dict[str, Any]]:
        """Entries of ``log.jsonl``, of one stage or of all."""
        entries = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
        return [entry for entry in entries if stage in (None, entry["stage"])]

    def routing(self, stage: str) -> list[dict[str, Any]]:
        """Entries of a stage's ``routing.jsonl``."""
        return [json.loads(line) for line in (self.folder / stage / "routing.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def quiet() -> Console:
    """A console that nobody sees."""
    return Console(quiet=True)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, quiet: Console) -> FinishedRun:
    """The recipe ``tiny`` from its first stage to its last; tests only read it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    start = time.monotonic()
    result = train(load_recipe("tiny"), folder, console=quiet)
    return FinishedRun(folder, result, time.monotonic() - start)


@pytest.fixture(scope="session")
def only_stage(tiny_run: FinishedRun) -> Callable[..., Recipe]:
    """Makes a recipe of one of ``tiny``'s stages, from its earlier stages' model, on its scenes or on given data."""

    def make(name: str, *, start: str | None = "pretrain", data: dict[str, Any] | None = None, **stage: Any) -> Recipe:
        values = load_recipe("tiny").model_dump(mode="json")
        values["stages"] = [{**s, **stage} for s in values["stages"] if s["name"] == name]
        if start is not None:
            values["model"]["start"] = str(tiny_run.folder / start / "model")
        scenes = tiny_run.folder / "scenes"
        files = {"train": str(scenes / "train.json"), "captions": str(scenes / "captions_train.json")}
        values["data"] = {**values["data"], "scenes": None, **files, **(data or {})}
        return Recipe.model_validate(values)

    return make
