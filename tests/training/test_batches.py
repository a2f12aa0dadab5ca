"""Stages that group or pack their samples: what they train on, how they resume, what they save."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file

import symphony_vlm
from symphony_vlm.config.recipe import Recipe, StageConfig
from symphony_vlm.data.conversation import IGNORE_INDEX
from symphony_vlm.model.attention import BY_DOCUMENT
from symphony_vlm.training.callbacks import JsonLog
from symphony_vlm.training.run import train
from symphony_vlm.training.trainer import StageTrainer

MODES: list[dict[str, Any]] = [
    {"packing": True, "max_length": 640, "batch_size": 1},
    {"group_by": "length", "batch_size": 4},
    {"group_by": "modality_length", "batch_size": 4},
]
MULTIMODAL = {"name": "instruct", "kind": "multimodal", "train": {"projector": 1e-3}}


class Interrupted(Exception):
    """Stands for a kill inside this process."""


def _losses(run: Path) -> list[tuple[int, float]]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The training batches of a run, and the attention they met."""
    batches: list[dict[str, Any]] = []
    original = StageTrainer.compute_loss

    def compute_loss(self: StageTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            batches.append(inputs | {"attention": model.language_model.config._attn_implementation})
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "compute_loss", compute_loss)
    return batches


@pytest.fixture
def mixed(tiny_run: Any, tmp_path: Path) -> dict[str, Any]:
    """Instruction data of which every third record is text alone."""
    records = json.loads((tiny_run.folder / "scenes" / "train.json").read_text())[:24]
    for number, record in enumerate(records):
        if number % 3 == 0:
            del record["image"]
            for turn in record["conversations"]:
                turn["value"] = turn["value"].replace("<image>\n", "")
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps(records))
    return {"train": str(path), "image_folder": str(tiny_run.folder / "scenes"), "validation_fraction": 0.0}


def _conversations(batches: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    """Token ids of the conversations of all batches, sorted."""
    found = []
    for batch in batches:
        for row, ids in enumerate(batch["input_ids"]):
            if "document_ids" in batch:
                documents = batch["document_ids"][row]
                found += [tuple(ids[documents == n].tolist()) for n in range(int(documents.max()) + 1)]
            else:
                found.append(tuple(ids[batch["attention_mask"][row] > 0].tolist()))
    return sorted(found)


def test_every_mode_sees_every_conversation_once_an_epoch(
    only_stage: Callable[..., Recipe], mixed: dict[str, Any], tmp_path: Path, quiet: Console, seen: list[dict[str, Any]]
) -> None:
    epochs = []
    for number, mode in enumerate([{"batch_size": 4}, *MODES]):
        seen.clear()
        train(only_stage("instruct", data=mixed, epochs=1, max_steps=-1, **mode), tmp_path / str(number), console=quiet)
        epochs.append(_conversations(seen))
        supervised = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in seen)
        assert supervised > 0
        if mode.get("packing"):
            tokens = sum(len(conversation) for conversation in epochs[0])
            assert tokens / 640 <= len(seen) <= 1.5 * tokens / 640 < 24 / 2
            assert {batch["attention"] for batch in seen} == {BY_DOCUMENT}
            assert max(batch["input_ids"].shape[1] for batch in seen) <= 640
        if mode.get("group_by") == "modality_length":
            image = "pixel_values"
            # 16 records with an image and 8 without, four in a batch: none is mixed.
            assert [image in batch for batch in seen].count(True) == 4
            assert all(len(batch[image]) == 4 for batch in seen if image in batch)
    assert len(epochs[0]) == 24
    assert epochs[0] == epochs[1] == epochs[2] == epochs[3]


@pytest.mark.parametrize("mode", MODES, ids=["packing", "length", "modality_length"])
def test_an_interrupted_stage_continues_exactly(
    mode: dict[str, Any],
    only_stage: Callable[..., Recipe],
    mixed: dict[str, Any],
    tmp_path: Path,
    quiet: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Inside the second epoch, whose order differs from the first's: three steps make an epoch."""
    settings = {"gradient_accumulation_steps": 2, "epochs": 2, "max_steps": -1, "log_steps": 1, "save_fraction": 0.3}
    recipe = only_stage("instruct", data=mixed, **settings, **mode)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(recipe, whole, console=quiet)
    assert [step for step, _ in _losses(whole)] == [1, 2, 3, 4, 5, 6]
    original = JsonLog.on_log

    def on_log(self: JsonLog, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        original(self, args, state, *rest, **kwargs)
        if state.global_step == 5:
            raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(JsonLog, "on_log", on_log)
        train(recipe, broken, console=quiet)
    train(recipe, broken, console=quiet)
    assert _losses(broken) == _losses(whole)
    found, expected = (load_file(run / "instruct" / "model" / "model.safetensors") for run in (broken, whole))
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


def test_a_model_of_packed_training_has_its_usual_attention(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    settings = {"packing": True, "batch_size": 1, "max_steps": 2, "gradient_checkpointing": True}
    train(only_stage("instruct", **settings), tmp_path / "run", console=quiet)
    for file in (tmp_path / "run").rglob("config.json"):
        assert BY_DOCUMENT not in file.read_text()
    model = symphony_vlm.load(tmp_path / "run", device="cpu")
    assert model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": True, "group_by": "length"}, "has nothing to group"),
        ({"packing": True, "independent_turns": True}, "'packing' and 'independent_turns' exclude each other"),
        ({"kind": "text", "train": {}, "packing": True}, "belongs to multimodal stages"),
        ({"kind": "text", "train": {}, "group_by": "length"}, "belongs to multimodal stages"),
        ({"group_by": "size"}, "modality_length"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StageConfig.model_validate(MULTIMODAL | settings)
