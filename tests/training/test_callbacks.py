"""The logs beside the training loop, when lines are torn or must be taken back."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.recording import RoutingRecorder
from symphony_vlm.training.callbacks import JsonLog, RoutingLog


def _state(step: int, *, max_steps: int = 10) -> TrainerState:
    return TrainerState(global_step=step, max_steps=max_steps, is_world_process_zero=True)


def _arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])


def _steps(path: Path) -> list[tuple[str, int]]:
    return [(entry["stage"], entry["step"]) for entry in map(json.loads, path.read_text().splitlines())]


def test_continuing_cuts_this_stages_later_lines_and_a_torn_one_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [{"stage": stage, "step": step} for stage, step in (("a", 50), ("b", 4), ("b", 8), ("b", 10))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "b", "st')
    JsonLog(path, "b").on_train_begin(_arguments(tmp_path), _state(8), TrainerControl())
    assert _steps(path) == [("a", 50), ("b", 4), ("b", 8)]


def test_a_line_that_is_whole_but_for_its_end_is_torn_too(tmp_path: Path) -> None:
    """Otherwise the next line would be appended to it."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"stage": "b", "step": 4}')
    log = JsonLog(path, "b")
    log.on_train_begin(_arguments(tmp_path), _state(4), TrainerControl())
    log.on_log(_arguments(tmp_path), _state(6), TrainerControl(), logs={"loss": 1.0})
    assert _steps(path) == [("b", 6)]


def test_a_first_start_needs_no_log(tmp_path: Path) -> None:
    JsonLog(tmp_path / "log.jsonl", "a").on_train_begin(_arguments(tmp_path), _state(0), TrainerControl())
    assert not (tmp_path / "log.jsonl").exists()


def test_only_numbers_are_logged_and_only_by_the_first_process(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = JsonLog(path, "a")
    log.on_log(_arguments(tmp_path), _state(2), TrainerControl(), logs={"loss": 1.5, "note": "x"})
    other = TrainerState(global_step=2, is_world_process_zero=False)
    log.on_log(_arguments(tmp_path), other, TrainerControl(), logs={"loss": 2.5})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"stage": "a", "step": 2, "loss": 1.5}]


def test_the_routing_log_cuts_torn_and_later_lines(tmp_path: Path) -> None:
    path = tmp_path / "routing.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lay')
    log = RoutingLog(path, RoutingRecorder(MoEConfig()))
    log.on_train_begin(_arguments(tmp_path), _state(2), TrainerControl(), model=nn.Module())
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
