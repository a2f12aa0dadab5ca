"""Under DDP, FSDP2 and DeepSpeed ZeRO all ranks hold one graph, and it is that of one process with all data.

Gradient accumulation, rows of unequal length, a rank with nothing but padding, or without images: see ``engines.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from symphony_vlm.moe.configuration import PRESETS

WORKER = Path(__file__).with_name("engines.py")
STEPS = 3
DDP = [*PRESETS, "own", "learnable", "fixed", "soft", "checkpointing", "autocast", "bfloat16", "native"]
FSDP2 = ["symphony_smoe", "symphony_xmoe", "learnable", "own", "routers-apart", "images", "checkpointing", "autocast"]
FSDP2 += ["bfloat16"]
ZERO = [*(f"zero{stage}-symphony_smoe" for stage in (1, 2, 3)), "zero2-bfloat16", "zero3-bfloat16"]
ZERO += [f"zero3-{name}" for name in ("symphony_xmoe", "learnable", "own", "images", "checkpointing")]


def train(folder: Path, *engines: str, timeout: int) -> dict[str, Any]:
    """States by step and scenario, of each of two processes and of a single one."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # DeepSpeed compiles with ninja, which is installed beside this Python.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = [sys.executable, str(WORKER), str(folder), *engines]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stderr
    return {"two": [torch.load(folder / f"2-{rank}.pt") for rank in range(2)], "one": torch.load(folder / "1-0.pt")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("engines"), "ddp", "fsdp2", timeout=240)


@pytest.fixture(scope="module")
def zero_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # The first start compiles an extension, for minutes on a busy machine.
    return train(tmp_path_factory.mktemp("zero"), "zero1", "zero2", "zero3", timeout=900)


def tensors(state: dict[str, Any]) -> list[Tensor]:
    return [*state["graphs"], *state["weights"].values()]


def compare(runs: dict[str, Any], name: str) -> None:
    """Two ranks with each other, bit for bit, and with the oracle."""
    first, second = (ranks[name] for ranks in runs["two"])
    alone = runs["one"][name]
    kind = name.split("-", 1)[1]
    assert len(first) == len(second) >= len(alone) == STEPS
    for a, b in zip(first, second, strict=True):
        assert a["updates"] == b["updates"] and a["statistics"] == b["statistics"]
        assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))

    # Hard counts are whole numbers, exact in fp32 in whatever order ranks and micro-batches are added. What is trained
    # or counted softly differs by the order of fp32 sums: 1.3e-7 measured, a few roundings of numbers up to 1.
    graph_tolerance = 1e-6 if kind in ("soft", "learnable") else 0.0
    for a, b in zip(first, alone, strict=False):
        assert a["updates"] == b["updates"]
        for x, y in zip(a["graphs"], b["graphs"], strict=True):
            assert x.dtype == torch.float32
            torch.testing.assert_close(x, y, atol=graph_tolerance, rtol=0)
        if kind not in ("autocast", "bfloat16"):  # these do not move, and engines keep them in different precision
            for key, weight in b["weights"].items():
                torch.testing.assert_close(a["weights"][key], weight, atol=1e-6, rtol=0)

    # What is compared has moved: by far more than the tolerances.
    if kind not in ("autocast", "bfloat16"):
        ways = [(alone[0]["weights"][key] - alone[-1]["weights"][key]).abs().max() for key in alone[0]["weights"]]
        assert max(ways) > 1e-2
    counted = kind not in ("smoe", "xmoe", "glam", "similarity_smoe", "attention_smoe", "learnable", "fixed")
    assert set(alone[-1]["updates"]) <= {STEPS if counted else 0}
    if counted:
        assert all((x - y).abs().max() > 1e-2 for x, y in zip(alone[0]["graphs"], alone[-1]["graphs"], strict=True))


@pytest.mark.parametrize("name", DDP)
def test_data_parallel_training_is_that_of_one_process(runs: dict[str, Any], name: str) -> None:
    compare(runs, f"ddp-{name}")


@pytest.mark.parametrize("name", FSDP2)
def test_training_with_sharded_parameters_is_that_of_one_process(runs: dict[str, Any], name: str) -> None:
    compare(runs, f"fsdp2-{name}")


def test_checkpointing_under_every_engine_leaves_the_graphs_as_they_are(runs: dict[str, Any]) -> None:
    alone = runs["one"]
    for name in ("ddp-checkpointing", "fsdp2-checkpointing"):
        for a, b in zip(runs["two"][0][name], alone["ddp-symphony_smoe"], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a["graphs"], b["graphs"], strict=True))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install symphony-vlm[test]")
@pytest.mark.parametrize("name", ZERO)
def test_training_under_zero_is_that_of_one_process_and_continues_from_its_checkpoint(
    zero_runs: dict[str, Any], name: str
) -> None:
    compare(zero_runs, name)
    for states in zero_runs["two"]:
        uninterrupted, continued = (tensors(state) for state in states[name][STEPS - 1 :])
        assert all(torch.equal(x, y) for x, y in zip(uninterrupted, continued, strict=True))
