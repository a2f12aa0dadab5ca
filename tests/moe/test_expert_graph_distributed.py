"""Two data-parallel processes (gloo, CPU) hold the graphs that one process with all data would hold."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")
TIMEOUT = 120


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """States by step, of each of two processes and of a single one."""
    folder = tmp_path_factory.mktemp("distributed")
    result = subprocess.run(
        [sys.executable, str(WORKER), str(folder), "2", "1"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert result.returncode == 0, result.stderr
    return {"two": [torch.load(folder / f"2-{rank}.pt") for rank in range(2)], "one": torch.load(folder / "1-0.pt")}


def test_all_processes_hold_the_same_bits_after_every_step(runs: dict[str, Any]) -> None:
    for first, second in zip(*runs["two"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first["graphs"], second["graphs"], strict=True))
        assert first["updates"] == second["updates"]


def test_the_graphs_are_those_of_one_process_with_all_data(runs: dict[str, Any]) -> None:
    """Hard counts are whole numbers, exact in fp32 in whatever order they are added, so the bits agree."""
    for two, one in zip(runs["two"][0], runs["one"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(two["graphs"], one["graphs"], strict=True))
        assert two["updates"] == one["updates"]


def test_every_step_with_tokens_moves_the_graphs_of_the_trained_layers(runs: dict[str, Any]) -> None:
    states = runs["two"][1]
    steps = itertools.pairwise(states)
    moved = [[not torch.equal(a, b) for a, b in zip(x["graphs"], y["graphs"], strict=True)] for x, y in steps]
    # Last: the step in which no process had a token. Third layer: frozen.
    assert moved == [[True, True, False]] * (len(states) - 2) + [[False] * 3]
    assert [int(n) for n in states[-1]["updates"]] == [len(states) - 1, len(states) - 1, 0]
