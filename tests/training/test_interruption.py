"""Signals and full disks while a stage trains: what is saved, what is said, and that the run goes on exactly."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from symphony_vlm.cli import entry
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.errors import SavingError, Stopped
from symphony_vlm.training.checkpoints import Checkpoints
from symphony_vlm.training.run import train
from symphony_vlm.training.trainer import StageTrainer
from symphony_vlm.training.writing import size_text


@pytest.fixture
def recipe(only_stage: Callable[..., Recipe]) -> Recipe:
    """Eight steps, a checkpoint after every fourth."""
    return only_stage("instruct", max_steps=8, batch_size=4, log_steps=4, save_fraction=0.5)


@pytest.fixture(scope="module")
def whole(only_stage: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory, quiet: Console) -> Path:
    """The run of `recipe` without interruption."""
    folder = tmp_path_factory.mktemp("interruption") / "whole"
    train(only_stage("instruct", max_steps=8, batch_size=4, log_steps=4, save_fraction=0.5), folder, console=quiet)
    return folder


def log(run: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in entries]


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "instruct").iterdir()}


def assert_equal_models(run: Path, reference: Path) -> None:
    found, expected = (load_file(folder / "instruct" / "model" / "model.safetensors") for folder in (run, reference))
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def send(monkeypatch: pytest.MonkeyPatch, step: int, *numbers: signal.Signals) -> None:
    """Signals that come in the middle of a step."""
    original = StageTrainer.training_step

    def training_step(self: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", training_step)


# Signals.


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_step_end_and_saves(
    recipe: Recipe,
    whole: Path,
    tmp_path: Path,
    quiet: Console,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        send(patch, 6, number)
        train(recipe, run, console=quiet)
    assert str(stopped.value) == (
        f"stopped by {number.name} after step 6 of instruct; the same command again continues instruct from step 6"
    )
    assert stopped.value.exit_code == code
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert names(run) == {"checkpoint-4", "checkpoint-6", "routing.jsonl"}
    train(recipe, run, console=quiet)
    assert_equal_models(run, whole)
    # One line more, where it stopped; the loss after it is that of the steps after it.
    here, there = ([entry for entry in log(folder) if "loss" in entry] for folder in (run, whole))
    assert [entry["step"] for entry in here] == [1, 4, 6, 8]
    assert [entry["step"] for entry in there] == [1, 4, 8]
    assert here[:2] == there[:2]
    # Means over two steps each, against one over four; the log has six digits or more.
    assert (here[2]["loss"] + here[3]["loss"]) / 2 == pytest.approx(there[2]["loss"], abs=1e-6)
    assert here[3]["records_seen/train.json"] == there[2]["records_seen/train.json"]


def test_slurms_second_sigterm_changes_nothing_and_ctrl_c_twice_stops_at_once(
    recipe: Recipe, whole: Path, tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        send(patch, 3, signal.SIGTERM, signal.SIGTERM)
        train(recipe, run, console=quiet)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        send(patch, 7, signal.SIGINT, signal.SIGINT)
        train(recipe, run, console=quiet)
    assert names(run) == {"checkpoint-3", "checkpoint-4", "routing.jsonl"}
    train(recipe, run, console=quiet)
    assert_equal_models(run, whole)


def test_a_signal_in_the_last_step_leaves_saving_the_model_to_the_next_start(
    recipe: Recipe, whole: Path, tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="continues instruct from step 8"):
        send(patch, 8, signal.SIGTERM)
        train(recipe, run, console=quiet)
    assert "model" not in names(run)
    assert train(recipe, run, console=quiet).step == 8
    assert_equal_models(run, whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_exit_code_tells_the_signal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise Stopped("stopped by a signal after step 6", number)

    monkeypatch.setattr(entry, "app", stop)
    with pytest.raises(SystemExit) as ended:
        entry.main(["train"])
    assert ended.value.code == code
    assert capsys.readouterr().err == "stopped by a signal after step 6\n"


# A full disk.


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """From the checkpoint of a step on, the kernel lets no file grow to a model's size."""
    original = Checkpoints.save

    def save(self: Checkpoints, at: int, *args: Any, **kwargs: Any) -> bool:
        if at == step:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        return original(self, at, *args, **kwargs)

    monkeypatch.setattr(Checkpoints, "save", save)


def test_a_full_disk_costs_checkpoints_and_ends_the_run_at_the_model_which_a_restart_saves(
    recipe: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = tmp_path / "run", io.StringIO()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with monkeypatch.context() as patch, pytest.raises(SavingError) as error:
            fill_the_disk(patch, 8)
            train(recipe, run, console=Console(file=said, width=1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    warnings = [line for line in said.getvalue().splitlines() if "could not be saved" in line]
    assert len(warnings) == 1
    size = sum(path.stat().st_size for path in (run / "instruct" / "checkpoint-4").iterdir())
    assert f"checkpoint-8 could not be saved (File too large): it takes about {size_text(size)}, and " in warnings[0], (
        warnings[0]
    )
    assert "checkpoint-4 stays. Training goes on" in warnings[0]
    assert str(error.value).startswith(f"{run / 'instruct' / 'model'}: the model could not be saved (File too large)")
    assert str(error.value).endswith("run the same command again: it continues from the last checkpoint.")
    assert names(run) == {"checkpoint-4", "routing.jsonl"}
    assert log(run) == log(whole)
    train(recipe, run, console=Console(quiet=True))
    assert log(run) == log(whole)
    assert_equal_models(run, whole)


def test_the_number_of_checkpoints_kept_is_a_setting(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    settings = {"max_steps": 4, "batch_size": 4, "log_steps": 1, "save_fraction": 0.25}
    train(only_stage("instruct", **settings, keep_checkpoints=3), tmp_path / "run", console=quiet)
    assert names(tmp_path / "run") == {"checkpoint-2", "checkpoint-3", "checkpoint-4", "model", "routing.jsonl"}
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        only_stage("instruct", keep_checkpoints=0)
