"""Which records a step trains on: every one as often as its weight says, the same ones after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from symphony_vlm.config.recipe import Recipe
from symphony_vlm.errors import InputError
from symphony_vlm.training.run import train
from symphony_vlm.training.run_data import open_run_data

WORKER = Path(__file__).with_name("sampling_worker.py")
BATCH, ACCUMULATION, EPOCHS = 2, 2, 2
Step = list[tuple[int, ...]]


def records(name: str, number: int) -> list[dict[str, Any]]:
    """Text alone, each with an answer of its own: sampling does not look at pictures."""
    return [
        {
            "id": f"{name}{i}",
            "conversations": [{"from": "human", "value": f"{name}?"}, {"from": "gpt", "value": f"{name} {i}."}],
        }
        for i in range(number)
    ]


def write(path: Path, values: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps(values))
    return str(path)


@pytest.fixture
def mixture(only_stage: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    """21 records, five that are seen twice, and half of eight: 35 an epoch."""
    sources = [
        write(tmp_path / "a.json", records("a", 21)),
        {"path": write(tmp_path / "b.json", records("b", 5)), "weight": 2},
        {"path": write(tmp_path / "c.json", records("c", 8)), "weight": 0.5},
    ]

    def make(**stage: Any) -> Recipe:
        data = {"captions": None, "train": sources, "validation_fraction": 0.0}
        settings = {"batch_size": BATCH, "gradient_accumulation_steps": ACCUMULATION, "epochs": EPOCHS}
        return only_stage("instruct", data=data, max_steps=-1, log_steps=1, save_fraction=0.15, **settings, **stage)

    return make


def steps_of(output: Path, rank: int) -> list[Step]:
    """By step; what was noted twice because of a kill must be the same both times."""
    steps: dict[int, Step] = {}
    for line in output.with_suffix(f".rank{rank}.jsonl").read_text().splitlines():
        entry = json.loads(line)
        found = [tuple(ids) for ids in entry["ids"]]
        assert steps.setdefault(entry["step"], found) == found
    return [steps[step] for step in range(len(steps))]


def run_all(folder: Path, jobs: list[dict[str, Any]]) -> None:
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, str(WORKER), str(file)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def log(run: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in entries]


def check_epochs(ranks: list[list[Step]]) -> None:
    """Every epoch has every record of `mixture` as often as its weight says, over all processes together."""
    for rank in ranks:
        assert len(rank) % EPOCHS == 0
    num_steps = len(ranks[0]) // EPOCHS
    epochs = []
    for epoch in range(EPOCHS):
        seen = [ids for rank in ranks for step in rank[epoch * num_steps : (epoch + 1) * num_steps] for ids in step]
        counts = Counter(ids for ids in seen if len(ids) > 1)
        # 21 + 4 once, 5 twice.
        assert sorted(counts.values()) == [1] * 25 + [2] * 5
        epochs.append(counts)
    assert epochs[0] == epochs[1], "the half of a source must be the same in every epoch"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_records_by_step_depend_on_seed_and_number_of_processes_alone(
    mixture: Callable[..., Recipe], tmp_path: Path, processes: int
) -> None:
    """Not on data-loader workers, and not on kills in the first epoch, at its end and in the second."""
    num_steps = {1: 18, 2: 10}[processes]
    jobs = []
    for name, workers, kills in (
        ("whole", 0, []),
        ("workers", 2, []),
        ("killed", 0, [2, num_steps // 2, num_steps - 2]),
        ("killed_workers", 2, [3, num_steps // 2 + 1]),
    ):
        recipe = mixture(dataloader_workers=workers).model_dump(mode="json")
        job = {"recipe": recipe, "processes": processes, "output": str(tmp_path / name)}
        jobs += [{**job, "kill_at": step} for step in [*kills, 0]]
    run_all(tmp_path, jobs)
    whole = [steps_of(tmp_path / "whole", rank) for rank in range(processes)]
    assert len(whole[0]) == num_steps
    check_epochs(whole)
    reference = log(tmp_path / "whole")
    seen = {"records_seen/a.json": 42, "records_seen/b.json": 20, "records_seen/c.json": 8}
    assert {key: value for key, value in reference[-1].items() if key.startswith("records_seen/")} == seen
    for name in ("workers", "killed", "killed_workers"):
        assert [steps_of(tmp_path / name, rank) for rank in range(processes)] == whole, name
        assert log(tmp_path / name) == reference, name


@pytest.mark.slow
def test_two_processes_share_a_stream_and_continue_it(only_stage: Callable[..., Recipe], tmp_path: Path) -> None:
    """The global batches are those of one process with twice the batch."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records("a", 30)))
    jobs = []
    for name, processes, batch, kills in (("one", 1, 4, []), ("two", 2, 2, []), ("killed", 2, 2, [3, 7])):
        data = {"captions": None, "train": str(path), "streaming": True, "shuffle_buffer": 8}
        settings = {"batch_size": batch, "gradient_accumulation_steps": 2, "max_steps": 9, "log_steps": 1}
        recipe = only_stage("instruct", data=data, save_fraction=0.25, **settings).model_dump(mode="json")
        job = {"recipe": recipe, "processes": processes, "output": str(tmp_path / name)}
        jobs += [{**job, "kill_at": step} for step in [*kills, 0]]
    run_all(tmp_path, jobs)
    one = [sorted(step) for step in steps_of(tmp_path / "one", 0)]
    two = [steps_of(tmp_path / "two", rank) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*two, strict=True)] == one
    assert [steps_of(tmp_path / "killed", rank) for rank in (0, 1)] == two
    assert log(tmp_path / "killed") == log(tmp_path / "two")


def test_an_epoch_of_one_process_has_every_record_as_often_as_its_weight_says(
    mixture: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    said: list[str] = []
    data = open_run_data(mixture(), tmp_path / "run", said.append)
    counts = {name: (count["train"], count["per_epoch"]) for name, count in data.counts.items()}
    assert counts == {"train: a.json": (21, 21), "train: b.json": (5, 10), "train: c.json": (8, 4)}
    assert "train: c.json: weight 0.5, 4 of 8 records an epoch" in said
    train(mixture(), tmp_path / "run", console=quiet)
    last = [entry for entry in log(tmp_path / "run") if "loss" in entry][-1]
    assert [last[f"records_seen/{name}.json"] for name in "abc"] == [42, 20, 8]
    state = json.loads((tmp_path / "run" / "state.json").read_text())["stages"]["instruct"]
    assert state["records_seen"] == {"a.json": 42, "b.json": 20, "c.json": 8}
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert provenance["counts"]["train: b.json"]["per_epoch"] == 10


def test_listed_records_are_left_out_before_they_can_be_a_fault(
    only_stage: Callable[..., Recipe], tmp_path: Path
) -> None:
    values = records("a", 10)
    values[3]["conversations"] = []
    listed = tmp_path / "faults.jsonl"
    listed.write_text(json.dumps({"file": "a.json", "index": 3, "id": "a3", "reason": "empty"}) + "\n")
    data = {"captions": None, "train": write(tmp_path / "a.json", values), "validation_fraction": 0.0}
    with pytest.raises(InputError, match="1 of 10 records cannot be used"):
        open_run_data(only_stage("instruct", data=data), tmp_path / "run", str)
    opened = open_run_data(only_stage("instruct", data={**data, "skip": str(listed)}), tmp_path / "run", str)
    assert [sample.id for sample in opened.train["train"]] == [f"a{i}" for i in range(10) if i != 3]
    assert opened.counts["train: a.json"]["listed"] == 1
    listed.write_text(json.dumps({"file": "a.json", "index": 10}) + "\n")
    with pytest.raises(InputError, match="index 10 is listed for a.json, which has 10 records"):
        open_run_data(only_stage("instruct", data={**data, "skip": str(listed)}), tmp_path / "run", str)


def test_files_of_the_same_name_are_told_apart(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.json", records(name, 4))
    sources = [str(tmp_path / name / "train.json") for name in "xy"]
    data = {"captions": None, "train": sources, "validation_fraction": 0.0}
    opened = open_run_data(only_stage("instruct", data=data), tmp_path / "run", quiet.print)
    assert list(opened.fingerprints) == sources
    assert list(opened.counts) == [f"train: {path}" for path in sources]
    assert opened.train["train"].labels == tuple(sources)
