"""Kill and continue: a run that was interrupted ends with the same bits as one that was not."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from symphony_vlm.config.loading import load_recipe
from symphony_vlm.training.callbacks import JsonLog
from symphony_vlm.training.checkpoints import Checkpoints
from symphony_vlm.training.run import train

STAGES = ("encoder", "language", "pretrain", "instruct")
MEASURED = ("runtime", "per_second")
"""Parts of the names of log fields that are measured times, which no two runs share."""


def _log(run: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if not any(part in k for part in MEASURED)} for entry in entries]


def _losses(run: Path) -> list[tuple[str, int, float]]:
    return [(entry["stage"], entry["step"], entry["loss"]) for entry in _log(run) if "loss" in entry]


def _lines(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a log that is being written."""
    path = run / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _assert_equal_runs(run: Path, reference: Path) -> None:
    """Bit for bit: every logged loss, and every tensor of every stage's model, expert graphs included."""
    assert _losses(run) == _losses(reference)
    weights = ["encoder/model/open_clip_model.safetensors"]
    weights += [f"{stage}/model/model.safetensors" for stage in STAGES[1:]]
    for name in weights:
        found, expected = load_file(run / name), load_file(reference / name)
        assert found.keys() == expected.keys()
        assert [key for key in found if not torch.equal(found[key], expected[key])] == []
    graphs = [key for key in expected if key.endswith("expert_graph.adjacency_EE")]
    assert len(graphs) == 2
    assert (run / "instruct/routing.jsonl").read_bytes() == (reference / "instruct/routing.jsonl").read_bytes()


class Interrupted(Exception):
    """Stands for a kill inside this process."""


def _interrupt_at(monkeypatch: pytest.MonkeyPatch, stage: str, step: int) -> None:
    original = JsonLog.on_log

    def on_log(self: JsonLog, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        original(self, args, state, *rest, **kwargs)
        if self._stage == stage and state.global_step == step:
            raise Interrupted

    monkeypatch.setattr(JsonLog, "on_log", on_log)


def test_a_run_killed_in_two_stages_and_continued_equals_an_uninterrupted_one(tiny_run: Any, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "symphony_vlm.cli", "train", "--config", "tiny", "--output", str(run), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    for stage, step in (("pretrain", 4), ("instruct", 6)):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        give_up = time.monotonic() + 240
        while not any(line["stage"] == stage and line["step"] >= step for line in _lines(run)):
            assert process.poll() is None, f"ended before step {step} of {stage}"
            assert time.monotonic() < give_up
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert json.loads((run / "state.json").read_text())["stages"][stage]["status"] == "running"
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr
    assert "instruct: continuing after step" in finished.stderr
    assert json.loads(finished.stdout.splitlines()[-1])["loss"] == tiny_run.result.loss
    _assert_equal_runs(run, tiny_run.folder)


def test_an_interruption_in_every_stage_leaves_no_trace(
    tiny_run: Any, tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with torn last lines in the logs, and with a checkpoint that was being written."""
    run = tmp_path / "run"
    recipe = load_recipe("tiny")
    # Before the first checkpoint, just before one is written (the log line comes first), and between two.
    for stage, step in (("encoder", 1), ("language", 4), ("pretrain", 2), ("instruct", 6)):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            _interrupt_at(patch, stage, step)
            train(recipe, run, console=quiet)
        with (run / "log.jsonl").open("a") as file:
            file.write(f'{{"stage": "{stage}", "step": {step + 1}, "los')
        torn = run / stage / ".saving" / "checkpoint-999"
        torn.mkdir(parents=True)
        (torn / "model.safetensors").write_bytes(b"half")
    with (run / "instruct" / "routing.jsonl").open("a") as file:
        file.write('{"step": 7, "lay')
    train(recipe, run, console=quiet)
    assert list(run.rglob("checkpoint-999")) == []
    assert _log(run) == _log(tiny_run.folder)
    _assert_equal_runs(run, tiny_run.folder)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run.folder, run, symlinks=True)
    (run / "model").unlink()
    shutil.rmtree(run / "instruct" / "model")
    os.truncate(run / "instruct" / "checkpoint-12" / "model.safetensors", 1000)
    state = json.loads((run / "state.json").read_text())
    state["stages"]["instruct"]["status"] = "running"
    (run / "state.json").write_text(json.dumps(state))
    saved: list[int] = []
    original = Checkpoints.save

    def save(self: Checkpoints, step: int, *rest: Any, **kwargs: Any) -> bool:
        saved.append(step)
        return original(self, step, *rest, **kwargs)

    monkeypatch.setattr(Checkpoints, "save", save)
    said = io.StringIO()
    train(load_recipe("tiny"), run, console=Console(file=said, width=1000))
    damage = [line for line in said.getvalue().splitlines() if "damaged (" in line]
    assert len(damage) == 1
    assert "checkpoint-12: damaged (model.safetensors has 1000 bytes and not " in damage[0]
    assert saved == [12], "it continued from checkpoint-8"
    names = {path.name for path in (run / "instruct").glob("*checkpoint-*")}
    assert names == {"checkpoint-8", "checkpoint-12", "damaged-checkpoint-12"}
    _assert_equal_runs(run, tiny_run.folder)


def test_a_kill_between_training_and_saving_the_model_needs_no_step_again(
    tiny_run: Any, tmp_path: Path, quiet: Console
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run.folder, run, symlinks=True)
    (run / "model").unlink()
    shutil.rmtree(run / "instruct" / "model")
    (run / "instruct" / ".model.tmp").mkdir()
    (run / "instruct" / ".model.tmp" / "half").touch()
    state = json.loads((run / "state.json").read_text())
    state["stages"]["instruct"]["status"] = "running"
    (run / "state.json").write_text(json.dumps(state))
    result = train(load_recipe("tiny"), run, console=quiet)
    assert (result.step, result.loss) == (tiny_run.result.step, tiny_run.result.loss)
    assert sorted(path.name for path in (run / "instruct" / "model").iterdir()) == sorted(
        path.name for path in (tiny_run.folder / "instruct" / "model").iterdir()
    )
    _assert_equal_runs(run, tiny_run.folder)


def test_accumulated_micro_batches_and_worker_processes_resume_exactly(
    only_stage: Callable[..., Any], tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than one epoch, so that the continued run must find its place inside the second."""
    settings = {"batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 14, "save_fraction": 0.3}
    recipe = only_stage("instruct", **settings, dataloader_workers=1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(recipe, whole, console=quiet)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        _interrupt_at(patch, "instruct", 14)
        train(recipe, broken, console=quiet)
    train(recipe, broken, console=quiet)
    assert len(_losses(whole)) == 8
    assert _losses(broken) == _losses(whole)
    found, expected = (load_file(run / "instruct" / "model" / "model.safetensors") for run in (broken, whole))
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []
