"""A stage with its experts shared out over two processes: the losses and weights without, and after kills too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments

from symphony_vlm.config.recipe import Recipe
from symphony_vlm.errors import InputError
from symphony_vlm.training.expert_parallel import ExpertParallelTrainer
from symphony_vlm.training.run import train

WORKER = Path(__file__).with_name("sampling_worker.py")
SETTINGS: dict[str, Any] = {"max_steps": 8, "batch_size": 4, "gradient_accumulation_steps": 2, "log_steps": 1}


def run(folder: Path, jobs: list[dict[str, Any]]) -> None:
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    command = [sys.executable, str(WORKER), str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


def log(folder: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in entries]


@pytest.mark.slow
def test_a_stage_with_shared_out_experts_is_the_stage_without(
    only_stage: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Two processes each time: data-parallel, with experts shared out, and the same killed twice.

    Experts are in the vision tower too, and the validation loss is computed by all processes together.
    """
    jobs = []
    for name, size, kills in (("data", 1, []), ("experts", 2, []), ("killed", 2, [3, 6])):
        values = only_stage("instruct", expert_parallel_size=size, save_fraction=0.25, **SETTINGS).model_dump(
            mode="json"
        )
        values["model"]["moe"] |= {"modules": ["language", "vision"], "expert_init_noise": 0.1}
        job = {"recipe": values, "processes": 2, "output": str(tmp_path / name)}
        jobs += [{**job, "kill_at": step} for step in [*kills, 0]]
    run(tmp_path, jobs)
    plain, shared_out = log(tmp_path / "data"), log(tmp_path / "experts")
    assert log(tmp_path / "killed") == shared_out
    assert [entry.keys() for entry in plain] == [entry.keys() for entry in shared_out]
    assert any("eval_loss" in entry for entry in plain)
    for entry, expected in zip(shared_out, plain, strict=True):
        # Differences of 2.4e-7 measured; AdamW can make more of a gradient that is next to nothing but rounding.
        numbers, expected_numbers = ({k: v for k, v in e.items() if k != "stage"} for e in (entry, expected))
        assert numbers == pytest.approx(expected_numbers, rel=1e-4, abs=1e-5)
    losses = [entry["loss"] for entry in plain if "loss" in entry]
    assert len(losses) == SETTINGS["max_steps"] and abs(losses[-1] - losses[0]) > 0.01

    folders = {
        name: tmp_path / name / "instruct" / "model" / "model.safetensors" for name in ("data", "experts", "killed")
    }
    expected, weights, continued = (load_file(path) for path in folders.values())
    assert weights.keys() == expected.keys() == continued.keys()
    for key, weight in weights.items():
        assert weight.equal(continued[key]), key
        assert weight.shape == expected[key].shape
        assert float((weight - expected[key]).abs().float().mean()) < 2e-6, key  # 8.5e-8 measured


def test_a_single_process_cannot_share_experts_out(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    with pytest.raises(InputError, match="no process group has been initialised.*torchrun"):
        train(only_stage("instruct", expert_parallel_size=2, **SETTINGS), tmp_path / "run", console=quiet)


def test_an_engine_other_than_data_parallelism_is_refused(tmp_path: Path) -> None:
    """Here there is none at all; FSDP and DeepSpeed would take one process's experts for another's."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(InputError, match="beside DistributedDataParallel alone, not NO. Set it to 1, or train with"):
        ExpertParallelTrainer(model=nn.Linear(2, 2), args=arguments, rates={"": 1e-3})


def test_experts_are_shared_out_where_there_are_experts(only_stage: Callable[..., Recipe]) -> None:
    with pytest.raises(ValidationError, match="'expert_parallel_size' belongs to multimodal stages"):
        only_stage("language", start=None, expert_parallel_size=2)
    with pytest.raises(ValidationError, match="greater than 0"):
        only_stage("instruct", expert_parallel_size=0)
