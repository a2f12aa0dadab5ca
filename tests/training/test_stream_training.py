"""Training on a stream: the same records after an interruption, and faults that keep their places."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from symphony_vlm.config.recipe import Recipe
from symphony_vlm.errors import InputError
from symphony_vlm.training.callbacks import JsonLog
from symphony_vlm.training.run import train
from symphony_vlm.training.run_data import open_run_data
from symphony_vlm.training.trainer import StageTrainer

SETTINGS = {"batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 9, "log_steps": 1, "save_fraction": 0.34}


class Interrupted(Exception):
    """Stands for a kill inside this process."""


def interrupt_at(patch: pytest.MonkeyPatch, step: int) -> None:
    original = JsonLog.on_log

    def on_log(self: JsonLog, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        original(self, args, state, *rest, **kwargs)
        if state.global_step == step:
            raise Interrupted

    patch.setattr(JsonLog, "on_log", on_log)


def log(run: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in entries]


@pytest.fixture
def lines(tiny_run: Any) -> list[dict[str, Any]]:
    """Records about scenes, each with an answer of its own, and absolute paths of their pictures."""
    scenes = tiny_run.folder / "scenes"
    records = json.loads((scenes / "train.json").read_text())
    for number, record in enumerate(records):
        record["image"] = str(scenes / record["image"])
        record["id"] = f"r{number}"
        record["conversations"] = [*record["conversations"][:1], {"from": "gpt", "value": f"It is number {number}."}]
    return records


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records))
    return str(path)


@pytest.fixture
def streamed(only_stage: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """A recipe of one multimodal stage on streamed files."""

    def make(sources: Any, *, data: dict[str, Any] | None = None, **stage: Any) -> Recipe:
        settings = {"captions": None, "train": sources, "streaming": True, "shuffle_buffer": 8, **(data or {})}
        return only_stage("instruct", data=settings, **{**SETTINGS, **stage})

    return make


@pytest.fixture
def trained_ids(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, ...]]]:
    """The token ids of the records by step, as they reach the model."""
    steps: list[list[tuple[int, ...]]] = []
    original = StageTrainer.get_batch_samples

    def get_batch_samples(self: StageTrainer, *args: Any) -> Any:
        batches, num_items = original(self, *args)
        rows = [(batch, row) for batch in batches for row in range(len(batch["input_ids"]))]
        steps.append([tuple(b["input_ids"][r][b["attention_mask"][r].bool()].tolist()) for b, r in rows])
        return batches, num_items

    monkeypatch.setattr(StageTrainer, "get_batch_samples", get_batch_samples)
    return steps


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_it_was_interrupted_whatever_the_number_of_workers(
    streamed: Callable[..., Recipe],
    lines: list[dict[str, Any]],
    tmp_path: Path,
    quiet: Console,
    monkeypatch: pytest.MonkeyPatch,
    trained_ids: list[list[tuple[int, ...]]],
    workers: int,
) -> None:
    """Two sources, more steps than an epoch of the smaller: its second round must be the same too."""
    sources = [
        {"path": write(tmp_path / "a.jsonl", lines[:40]), "weight": 3},
        write(tmp_path / "b.jsonl", lines[40:52]),
    ]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(streamed(sources), whole, console=quiet)
    expected = [sorted(step) for step in trained_ids]
    assert len(expected) == 9
    for step in (2, 5, 7):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            interrupt_at(patch, step)
            train(streamed(sources, dataloader_workers=workers), broken, console=quiet)
    trained_ids.clear()
    train(streamed(sources, dataloader_workers=workers), broken, console=quiet)
    assert [sorted(step) for step in trained_ids] == expected[6:]
    assert log(broken) == log(whole)
    last = [entry for entry in log(whole) if "loss" in entry][-1]
    assert last["records_seen/a.jsonl"] + last["records_seen/b.jsonl"] == 9 * 6
    found, wanted = (load_file(run / "instruct" / "model" / "model.safetensors") for run in (broken, whole))
    assert [key for key in found if not torch.equal(found[key], wanted[key])] == []
    seen = {key.removeprefix("records_seen/"): value for key, value in last.items() if key.startswith("records_seen/")}
    assert json.loads((broken / "state.json").read_text())["stages"]["instruct"]["records_seen"] == seen


def test_held_out_pictures_never_train(
    streamed: Callable[..., Recipe], lines: list[dict[str, Any]], tmp_path: Path, quiet: Console
) -> None:
    recipe = streamed(write(tmp_path / "a.jsonl", lines), data={"validation_fraction": 0.3})
    data = open_run_data(recipe, tmp_path / "run", quiet.print)
    held = {ref.name for sample in data.validation["train"] for ref in sample.images}
    draws = data.stream(recipe.stages[0]).training()
    trained = {ref.name for _ in range(3 * len(lines)) for ref in next(draws).sample().images}
    assert held
    assert not held & trained
    assert held | trained == {record["image"] for record in lines}
    written = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert {record["image"] for record in written} == held


def damaged(records: list[dict[str, Any]], folder: Path) -> list[Any]:
    """Every second record faulty, in three ways."""
    (folder / "torn.png").write_bytes(b"half a picture")
    faulty: list[Any] = list(records)
    for number in range(0, len(records), 2):
        if number % 3 == 0:
            faulty[number] = '{"id": "torn'
        elif number % 3 == 1:
            faulty[number] = {**records[number], "image": str(folder / "torn.png")}
        else:
            faulty[number] = {**records[number], "conversations": []}
    return faulty


def test_a_faulty_record_stops_training_with_its_name(
    streamed: Callable[..., Recipe], lines: list[dict[str, Any]], tmp_path: Path, quiet: Console
) -> None:
    for workers in (0, 1):
        recipe = streamed(
            write(tmp_path / "a.jsonl", [lines[0], *damaged(lines[1:24], tmp_path)]),
            data={"validation_fraction": 0.0, "shuffle_buffer": 1},
            dataloader_workers=workers,
        )
        with pytest.raises(InputError, match=r"^a\.jsonl: record [0-9]") as error:
            train(recipe, tmp_path / f"run{workers}", console=quiet)
        assert "on_bad_sample: skip" in str(error.value)
        assert "Traceback" not in str(error.value)


def test_skipped_faults_keep_their_places_and_are_counted_and_listed(
    streamed: Callable[..., Recipe],
    lines: list[dict[str, Any]],
    tmp_path: Path,
    quiet: Console,
    monkeypatch: pytest.MonkeyPatch,
    trained_ids: list[list[tuple[int, ...]]],
) -> None:
    """The good records train in the steps in which they would have trained; the list can be given as data.skip."""
    settings = {"validation_fraction": 0.0, "on_bad_sample": "skip", "shuffle_buffer": 4}
    path = tmp_path / "a.jsonl"
    train(streamed(write(path, lines[:27]), data=settings), tmp_path / "good", console=quiet)
    expected = list(trained_ids)
    trained_ids.clear()
    write(path, damaged(lines[:27], tmp_path))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, 5)
        train(streamed(str(path), data=settings), tmp_path / "run", console=quiet)
    del trained_ids[3:]
    train(streamed(str(path), data=settings), tmp_path / "run", console=quiet)
    for found, wanted in zip(trained_ids, expected, strict=True):
        assert [len(f) == 1 or f == w for f, w in zip(found, wanted, strict=True)] == [True] * len(wanted)
    num_placeholders = sum(len(ids) == 1 for step in trained_ids for ids in step)
    faults = [json.loads(line) for line in (tmp_path / "run" / "instruct" / "faults.jsonl").read_text().splitlines()]
    last = [entry for entry in log(tmp_path / "run") if "loss" in entry][-1]
    assert len(faults) == num_placeholders == last["records_skipped"] == 54 - last["records_seen/a.jsonl"] > 20
    assert {fault["index"] % 2 for fault in faults} == {0}
    assert {fault["file"] for fault in faults} == {"a.jsonl"}
    assert all("a.jsonl: record " in fault["reason"] for fault in faults)
    again = streamed(str(path), data={**settings, "skip": str(tmp_path / "run" / "instruct" / "faults.jsonl")})
    assert open_run_data(again, tmp_path / "again", quiet.print).counts["train: a.jsonl"]["listed"] == 14


def test_a_batch_of_placeholders_only_has_no_loss_and_moves_nothing_else(
    streamed: Callable[..., Recipe], lines: list[dict[str, Any]], tmp_path: Path, quiet: Console
) -> None:
    """All but the first record is faulty: whole steps have nothing to learn from."""
    records = [lines[0], *({**line, "conversations": []} for line in lines[1:80])]
    recipe = streamed(
        write(tmp_path / "a.jsonl", records),
        data={"validation_fraction": 0.0, "on_bad_sample": "skip", "shuffle_buffer": 1},
    )
    train(recipe, tmp_path / "run", console=quiet)
    losses = [entry["loss"] for entry in log(tmp_path / "run") if "loss" in entry]
    assert losses[0] > 0
    assert losses[1:] == [0.0] * 8
    weights = load_file(tmp_path / "run" / "instruct" / "model" / "model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())


def test_data_that_changed_between_a_kill_and_a_restart_is_an_error(
    streamed: Callable[..., Recipe],
    lines: list[dict[str, Any]],
    tmp_path: Path,
    quiet: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "a.jsonl"
    for streaming in (True, False):
        recipe = streamed(write(path, lines), data={"streaming": streaming})
        run = tmp_path / f"run_{streaming}"
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            interrupt_at(patch, 2)
            train(recipe, run, console=quiet)
        write(path, [*lines[:-1], {**lines[-1], "id": "another"}])
        with pytest.raises(InputError, match=r"a\.jsonl changed since the run began"):
            train(recipe, run, console=quiet)
        write(path, lines)
        assert train(recipe, run, console=quiet).step == 9


@pytest.mark.parametrize(
    ("data", "stage", "message"),
    [({}, {"max_steps": -1}, "max_steps"), ({}, {"kind": "text", "train": {}, "upcycle": False}, "text stage")],
)
def test_what_a_stream_cannot_do_is_refused_by_the_recipe(
    streamed: Callable[..., Recipe], data: dict[str, Any], stage: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        streamed("a.jsonl", data=data, **stage)


def test_a_new_tokenizer_is_trained_on_the_first_records(
    streamed: Callable[..., Recipe], lines: list[dict[str, Any]], tmp_path: Path, quiet: Console
) -> None:
    values = streamed(write(tmp_path / "a.jsonl", lines)).model_dump(mode="json")
    values["model"]["start"] = None
    data = open_run_data(Recipe.model_validate(values), tmp_path / "run", quiet.print)
    held = {sample.id for sample in data.validation["train"]}
    assert {sample.id for sample in data.train["train"]} == {record["id"] for record in lines} - held
    assert all(sample.messages[0].text for sample in data.train["train"])
