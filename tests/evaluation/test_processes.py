"""Several processes, kills and restarts leave no trace in what an evaluation has found."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from symphony_vlm.data.scenes import generate_scenes
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.answer import Answer
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.predictor import Predictor
from symphony_vlm.evaluation.processes import Processes
from symphony_vlm.evaluation.report import write_report
from symphony_vlm.evaluation.runner import EvaluationPlan, evaluate

ROOT = Path(__file__).resolve().parents[2]
CELLS = ("scenes.fog.1.jsonl", "scenes.fog.4.jsonl", "scenes.none.0.jsonl")


@pytest.fixture(scope="module")
def plan(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluationPlan:
    """Three cells of ten pictures with eight questions each."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    generate_scenes(folder, train=1, test=10)
    return EvaluationPlan(
        model=str(tiny_model_folder),
        tasks=("scenes",),
        data=folder,
        corruptions=("fog",),
        severities=(1, 4),
        max_new_tokens=4,
        batch_size=16,
    )


@pytest.fixture(scope="module")
def whole(plan: EvaluationPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By one process, one question at a time, without an interruption; tests only read it."""
    output = tmp_path_factory.mktemp("evaluation") / "whole"
    evaluate(dataclasses.replace(plan, batch_size=1), output, console=Console(quiet=True))
    return output


@pytest.fixture(scope="module")
def reported(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole` as the command leaves it, with the report's part of the results."""
    output = tmp_path_factory.mktemp("evaluation") / "reported"
    shutil.copytree(whole, output)
    write_report([output], output)
    return output


def command(plan: EvaluationPlan, output: Path) -> list[str]:
    """The plan as arguments of ``eval``."""
    return [
        *("--model", plan.model, "--task", "scenes", "--data", str(plan.data), "--output", str(output)),
        *("--corruption", "fog", "--severity", "1,4", "--max-new-tokens", "4", "--batch-size", "16", "--json"),
    ]


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    names = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform == "linux":
        names["GLOO_SOCKET_IFNAME"] = "lo"
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=os.environ | names, stdout=file, stderr=file
        )


def predictions(output: Path) -> dict[str, str]:
    """The files' texts without the two fields that say when and where."""
    files = sorted((output / "predictions").glob("*.jsonl"))
    return {path.name: re.sub(r', "seconds": [0-9.e-]+, "rank": \d+}\n', "}\n", path.read_text()) for path in files}


def results(output: Path) -> dict[str, Any]:
    """The document but for the part that says when and where."""
    document: dict[str, Any] = json.loads((output / "results.json").read_text())
    del document["provenance"]
    return document


def item(picture: int, question: int) -> EvaluationItem:
    return EvaluationItem(id=f"{picture}-{question}", question="?", answers=("",), image_key=f"{picture}.png")


@pytest.mark.parametrize("size", [1, 2, 5])
def test_each_picture_belongs_to_one_process_with_all_its_questions_and_they_share_evenly(size: int) -> None:
    processes = [Processes(rank=rank, size=size) for rank in range(size)]
    shares = [0] * size
    for picture in range(1000):
        (owner,) = [p.rank for p in processes if p.owns(item(picture, 0))]
        assert all(processes[owner].owns(item(picture, question)) for question in range(8))
        shares[owner] += 1
    # Shares of a fair hash are binomial: five standard deviations.
    assert all(abs(share - 1000 / size) <= 5 * (1000 / size) ** 0.5 for share in shares)


def test_items_without_a_picture_are_spread_too() -> None:
    items = [EvaluationItem(id=str(n), question="?", answers=("",)) for n in range(100)]
    assert 20 < sum(Processes(rank=0, size=2).owns(one) for one in items) < 80


def test_two_processes_of_torchrun_write_what_one_process_writes(
    plan: EvaluationPlan, reported: Path, tmp_path: Path
) -> None:
    output, log = tmp_path / "two", tmp_path / "log"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "eval.benchmark"]
    process = start([*launcher, *command(plan, output)], log)
    try:
        assert process.wait(timeout=240) == 0, log.read_text()
    finally:
        process.kill()
    assert predictions(output) == predictions(reported)
    assert results(output) == results(reported)
    records = [json.loads(line) for line in (output / "predictions" / CELLS[0]).read_text().splitlines()]
    assert {record["rank"] for record in records} == {0, 1}
    assert json.loads((output / "results.json").read_text())["provenance"]["processes"] == 2
    assert sum(line.startswith('{"results"') for line in log.read_text().splitlines()) == 1, "one process reports"
    assert list((output / "predictions" / "parts").iterdir()) == []


def test_what_processes_of_another_number_have_answered_is_not_answered_again(
    plan: EvaluationPlan, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three processes were killed in the first cell, the last of their lines torn."""
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "results.json").unlink()
    folder = tmp_path / "out" / "predictions"
    lines = (folder / CELLS[2]).read_text().splitlines(keepends=True)
    (folder / "parts").mkdir()
    (folder / "parts" / "scenes.none.0.rank2.jsonl").write_text("".join(reversed(lines[20:45])) + '{"item_id": "sc')
    (folder / "parts" / "scenes.none.0.rank1.jsonl").write_text("".join(lines[45:60]))
    (folder / CELLS[2]).write_text("".join(lines[5:20]))
    asked: list[str] = []
    original = Predictor.answer

    def answer(self: Predictor, items: Any, features: Any) -> list[Answer]:
        asked.extend(one.id for one in items)
        return original(self, items, features)

    monkeypatch.setattr(Predictor, "answer", answer)
    evaluate(plan, tmp_path / "out", console=Console(quiet=True))
    missing = [json.loads(line)["item_id"] for line in lines[:5] + lines[60:]]
    assert sorted(asked) == missing
    assert predictions(tmp_path / "out") == predictions(whole)
    assert results(tmp_path / "out") == results(whole)


def test_two_different_answers_to_one_question_stop_the_merge(
    plan: EvaluationPlan, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "out")
    folder = tmp_path / "out" / "predictions"
    record = json.loads((folder / CELLS[2]).read_text().splitlines()[3])
    part = folder / "parts" / "scenes.none.0.rank1.jsonl"
    part.parent.mkdir()
    part.write_text(json.dumps(record | {"seconds": 9.0, "rank": 1}) + "\n")
    evaluate(plan, tmp_path / "out", console=Console(quiet=True))
    part.write_text(json.dumps(record | {"prediction": "something else"}) + "\n")
    with pytest.raises(
        InputError, match=rf"{record['item_id']}.* was answered 'something else', but .*keep one's"
    ) as e:
        evaluate(plan, tmp_path / "out", console=Console(quiet=True))
    assert e.value.where == str(part)
    assert predictions(tmp_path / "out") == predictions(whole)


@pytest.mark.parametrize("seed", range(10))
def test_an_interruption_anywhere_inside_the_evaluation_changes_nothing(
    plan: EvaluationPlan, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """As by a kill: at any write, which leaves a piece of the line."""
    from symphony_vlm.evaluation import records

    numbers = random.Random(seed)
    last = numbers.randrange(240)
    original, count = records._line, 0

    def line(record: Any) -> str:
        nonlocal count
        count += 1
        if count > last:
            raise KeyboardInterrupt
        text = original(record)
        return text[: numbers.randrange(len(text))] if count == last else text

    monkeypatch.setattr(records, "_line", line)
    with pytest.raises(KeyboardInterrupt):
        evaluate(dataclasses.replace(plan, batch_size=numbers.choice([1, 5, 64])), tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()
    monkeypatch.setattr(records, "_line", original)
    evaluate(plan, tmp_path / "out", console=Console(quiet=True))
    assert predictions(tmp_path / "out") == predictions(whole)
    assert results(tmp_path / "out") == results(whole)


@pytest.mark.slow
def test_ten_kills_at_random_moments_and_a_rerun_give_the_same_results(
    plan: EvaluationPlan, reported: Path, tmp_path: Path
) -> None:
    """Each start is killed at a moment of its own, from its beginning to near its end; then one runs through."""
    output, log = tmp_path / "killed", tmp_path / "log"
    arguments = ["-m", "eval.benchmark", *command(plan, output)]
    begin = time.monotonic()
    process = start(["-m", "eval.benchmark", *command(plan, tmp_path / "timed")], log)
    assert process.wait(timeout=240) == 0, log.read_text()
    seconds = time.monotonic() - begin
    numbers, answered = random.Random(0), []
    for _ in range(10):
        process = start(arguments, log)
        # Half of the moments are in the last third, where questions are answered.
        time.sleep(seconds * numbers.choice([numbers.uniform(0, 0.66), numbers.uniform(0.66, 1)]))
        process.send_signal(signal.SIGKILL)
        process.wait()
        answered.append(sum(text.count("\n") for text in predictions(output).values()))
    assert answered == sorted(answered), "nothing that was answered is lost"
    process = start(arguments, log)
    assert process.wait(timeout=240) == 0, log.read_text()
    assert predictions(output) == predictions(reported)
    assert results(output) == results(reported)
