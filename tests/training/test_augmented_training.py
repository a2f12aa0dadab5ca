"""Corrupted pictures in real stages: each epoch otherwise, for any number of workers, through interruptions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from symphony_vlm.config.loading import load_recipe
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.data.augmentation import Augmentation
from symphony_vlm.data.scenes import generate_scenes
from symphony_vlm.training.callbacks import JsonLog
from symphony_vlm.training.run import train

AUGMENTATION = {"corruptions": ["gaussian_noise", "contrast"], "severities": [5], "probability": 0.5}
Make = Callable[..., Recipe]
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Make:
    """Six steps of ``tiny``'s last stage over two epochs of 24 records, from a random model."""
    scenes = generate_scenes(tmp_path_factory.mktemp("augmented") / "scenes", train=30, test=1)
    records = json.loads(scenes.train_json.read_text())[:26]
    path = scenes.train_json.with_name("few.jsonl")
    path.write_text("\n".join(map(json.dumps, records)))

    def recipe(augmentation: dict[str, Any] | None, *, data: dict[str, Any] | None = None, **stage: Any) -> Recipe:
        values = load_recipe("tiny").model_dump(mode="json")
        steps = {"max_steps": 6, "upcycle": False, "log_steps": 1, "save_fraction": 1 / 3}
        values["stages"] = [{**values["stages"][-1], **steps, **stage}]
        values["model"]["start"] = str(tiny_model_folder)
        files = {"train": str(path), "scenes": None, "validation_fraction": 0.1}
        values["data"] = {**values["data"], **files, "augmentation": augmentation, **(data or {})}
        return Recipe.model_validate(values)

    return recipe


def _log(folder: Path, field: str) -> list[float]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry[field] for entry in entries if field in entry]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "instruct" / "model" / "model.safetensors")
    return found


def _equal(run: Path, other: Path) -> bool:
    found, expected = _weights(run), _weights(other)
    return _log(run, "loss") == _log(other, "loss") and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.fixture(scope="module")
def augmented(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run; tests only read it."""
    folder = tmp_path_factory.mktemp("runs") / "augmented"
    train(make(AUGMENTATION), folder, console=QUIET)
    return folder


def test_it_changes_what_is_trained_on_and_not_what_is_validated_on(
    make: Make, augmented: Path, tmp_path: Path
) -> None:
    stage = {"max_steps": 1, "validate_at_start": True}
    train(make(None, **stage), tmp_path / "plain", console=QUIET)
    train(make(AUGMENTATION, **stage), tmp_path / "one", console=QUIET)
    plain, one = (tmp_path / name for name in ("plain", "one"))
    assert _log(plain, "eval_loss")[0] == _log(one, "eval_loss")[0], "before the first step"
    assert _log(plain, "loss")[0] != _log(one, "loss")[0]
    assert _log(one, "loss")[0] == _log(augmented, "loss")[0]


def test_workers_do_not_matter(make: Make, augmented: Path, tmp_path: Path) -> None:
    train(make(AUGMENTATION, dataloader_workers=2), tmp_path / "run", console=QUIET)
    assert _equal(tmp_path / "run", augmented)


def test_an_interruption_in_the_second_epoch_leaves_no_trace(
    make: Make, augmented: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Exception):
        pass

    original = JsonLog.on_log

    def on_log(self: JsonLog, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        original(self, args, state, *rest, **kwargs)
        if state.global_step == 5:
            raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(JsonLog, "on_log", on_log)
        train(make(AUGMENTATION), tmp_path / "run", console=QUIET)
    assert (tmp_path / "run" / "instruct" / "checkpoint-4").is_dir()
    train(make(AUGMENTATION), tmp_path / "run", console=QUIET)
    lines = [json.loads(line) for line in (augmented / "log.jsonl").read_text().splitlines()]
    (epoch,) = [line["epoch"] for line in lines if line["step"] == 4 and "loss" in line]
    assert 1 < epoch < 2, "it went on in the second epoch"
    assert _equal(tmp_path / "run", augmented)


def test_the_epochs_are_those_of_the_trainer(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = []
    monkeypatch.setattr(Augmentation, "__call__", lambda self, ref, image: epochs.append(self.epoch) or image)
    train(make(AUGMENTATION, max_steps=7, data={"validation_fraction": 0.0}), tmp_path / "run", console=QUIET)
    # 26 records are three batches of eight and one of two.
    assert epochs[:26] == [0] * 26
    assert set(epochs[26:]) == {1} and len(epochs) >= 26 + 24


def test_a_stream_counts_how_often_its_source_was_read(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs = []
    monkeypatch.setattr(Augmentation, "__call__", lambda self, ref, image: epochs.append(self.epoch) or image)
    train(make(AUGMENTATION, data={"streaming": True, "validation_fraction": 0.0}), tmp_path / "run", console=QUIET)
    assert len(epochs) >= 48 and epochs == sorted(epochs)
    assert epochs.count(0) == 26
