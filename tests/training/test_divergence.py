"""Numbers that stop being finite: the step changes nothing, a warning says what, the run stops in time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

import symphony_vlm.model.pretrained as pretrained
from symphony_vlm.training.divergence import Diverged, DivergenceWatch
from symphony_vlm.training.run import train
from symphony_vlm.training.stage_warnings import StageWarnings


def _spoil(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool], factor: float = float("nan")) -> None:
    """Makes the training loss of some steps not finite; of training alone, which wants `num_items_in_batch`."""
    original, calls = pretrained.training_loss, iter(range(1, 10**6))

    def training_loss(logits: Any, targets: Any, routing: Any, *, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        loss, parts = original(logits, targets, routing, num_items_in_batch=num_items_in_batch, **kwargs)
        if logits.requires_grad and bad(next(calls)):
            loss, parts = loss * factor, parts | {"cross_entropy": parts["cross_entropy"] * factor}
        return loss, parts

    monkeypatch.setattr(pretrained, "training_loss", training_loss)


def _warnings(run: Path, stage: str) -> list[dict[str, Any]]:
    path = run / stage / "warnings.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_a_step_that_is_not_finite_leaves_the_weights_and_the_next_goes_on(
    only_stage: Callable[..., Any], tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 4, "save_fraction": 0.25, "log_steps": 1, "schedule": "constant", "warmup_ratio": 0.0}
    recipe = only_stage("pretrain", **settings)
    _spoil(monkeypatch, lambda step: step in (3, 4))
    train(recipe, tmp_path, console=quiet)
    weights = {step: load_file(tmp_path / "pretrain" / f"checkpoint-{step}" / "model.safetensors") for step in (3, 4)}
    model = load_file(tmp_path / "pretrain" / "model" / "model.safetensors")
    assert all(torch.equal(weights[3][name], weights[4][name]) for name in weights[3])
    assert all(torch.equal(model[name], weights[4][name]) for name in model)
    (warning,) = _warnings(tmp_path, "pretrain")
    assert (warning["kind"], warning["step"]) == ("not_finite", 3)
    assert "cross_entropy" in warning["message"] and "lower learning rate" in warning["remedy"]


def test_several_in_a_row_stop_the_run_and_the_error_names_the_last_good_checkpoint(
    only_stage: Callable[..., Any], tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = only_stage("pretrain", max_steps=8, log_steps=2, save_fraction=0.25)
    _spoil(monkeypatch, lambda step: step == 2 or step >= 5)
    with pytest.raises(Diverged) as stop:
        train(recipe, tmp_path, console=quiet)
    # Step 2 alone did not count; 5, 6 and 7 do. The checkpoint of step 6 has the weights of step 4.
    assert "in 3 steps in a row, the last of them 7" in str(stop.value)
    assert "pretrain/checkpoint-6 is the last good checkpoint" in str(stop.value)
    saved = load_file(tmp_path / "pretrain" / "checkpoint-6" / "model.safetensors")
    assert all(value.isfinite().all() for value in saved.values())


def test_a_router_that_refuses_ends_the_run_at_once_and_is_named(
    only_stage: Callable[..., Any], tmp_path: Path, quiet: Console
) -> None:
    rates = {"vision_tower": 1e30, "projector": 1e30, "language_model": 1e30}
    recipe = only_stage("instruct", train=rates, max_steps=4, log_steps=4, warmup_ratio=0.0)
    with pytest.raises(Diverged, match="in step 2 decoder layer 0: the router's logits are not finite"):
        train(recipe, tmp_path, console=quiet)
    (warning,) = _warnings(tmp_path, "instruct")
    assert (warning["layer"], warning["step"]) == ("decoder layer 0", 2)


def _watch(tmp_path: Path, said: list[str], **settings: Any) -> DivergenceWatch:
    warnings = StageWarnings(tmp_path / "warnings.jsonl", said.append, repeat_steps=100)
    defaults: dict[str, Any] = {"stop_after": 3, "last_saved": lambda: 0, "stage": "instruct"}
    return DivergenceWatch(warnings, **defaults | settings)


def test_a_gradient_alone_is_enough_and_a_finite_step_begins_the_count_anew(tmp_path: Path) -> None:
    said: list[str] = []
    watch = _watch(tmp_path, said)
    model = nn.Linear(2, 2)
    for step in range(1, 12):
        model.weight.grad = torch.ones(2, 2)
        watch.note(torch.tensor(1.0), None)
        norm = torch.tensor(1.0 if step % 3 == 0 else float("inf"))
        watch.check(model, norm, step, is_taken=False)
        assert (model.weight.grad is None) == (step % 3 != 0)
    assert said == [said[0]] and "gradient norm is inf" in said[0], "once, not at every step"


def test_an_engine_that_has_already_moved_the_weights_is_stopped_at_once(tmp_path: Path) -> None:
    watch = _watch(tmp_path, [], last_saved=lambda: 40)
    watch.note(torch.tensor(float("nan")), None)
    with pytest.raises(Diverged, match="instruct/checkpoint-40"):
        watch.check(nn.Linear(2, 2), 1.0, 41, is_taken=True)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    watch, model = _watch(tmp_path, []), nn.Linear(2, 2)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    state, save = TrainerState(global_step=5), TrainerControl(should_save=True)
    watch.on_step_end(arguments, state, save, model=model)
    model.weight.data[0, 0] = float("nan")
    watch.on_step_end(arguments, state, TrainerControl(), model=model)
    with pytest.raises(Diverged, match="nothing is saved"):
        watch.on_step_end(arguments, state, save, model=model)


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="^out of memory$"), _watch(tmp_path, []).forward(1):
        raise RuntimeError("out of memory")


def test_warnings_are_repeated_after_a_while_and_taken_back_by_a_restart(tmp_path: Path) -> None:
    said: list[str] = []
    warnings = StageWarnings(tmp_path / "warnings.jsonl", said.append, repeat_steps=10)
    warnings.begin(0)
    for step in range(1, 31):
        warnings.give("collapsed_router", step, "It has.", "Try.", layer="decoder layer 1")
    warnings.give("collapsed_router", 30, "It has.", "Try.", layer="decoder layer 2")
    steps = [json.loads(line)["step"] for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert steps == [1, 11, 21, 30] and len(said) == 4
    again = StageWarnings(tmp_path / "warnings.jsonl", said.append, repeat_steps=10)
    again.begin(15)
    again.give("collapsed_router", 16, "It has.", "Try.", layer="decoder layer 1")
    again.give("collapsed_router", 21, "It has.", "Try.", layer="decoder layer 1")
    steps = [json.loads(line)["step"] for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert steps == [1, 11, 21]


def test_processes_agree_on_what_is_left_out_and_add_up_their_speeds(tmp_path: Path) -> None:
    """One with a finite loss must do as the other does, or their weights would part."""
    worker = Path(__file__).with_name("divergence_worker.py")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(tmp_path)],
            env=os.environ | places | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120) for process in processes]
    first, second = (json.loads(out.splitlines()[-1]) for out, err in said if out or pytest.fail(err))
    assert first == second
    assert first["kept"] == [True, False, True, False, False] and first["stopped"] == 5
    figures = first["figures"]
    assert figures["padding_share"] == 1 - 300 / 800
    # Both sums are over the same seconds; FLOPs are given by device.
    assert figures["runtime/tokens_per_second"] == pytest.approx(100 * figures["runtime/samples_per_second"], rel=1e-4)
    tflops = figures["runtime/tokens_per_second"] * 1e9 / 1e12 / 2
    assert figures["runtime/model_tflops"] == pytest.approx(tflops, rel=1e-4) == figures["runtime/mfu"]
    assert [entry["step"] for entry in map(json.loads, (tmp_path / "warnings.jsonl").open())] == [2, 4, 5]
