"""Processes stay in step where one has images and another has none (gloo, CPU, plain DDP)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("distributed_batches_worker.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Gradients by step, of each of two processes and of a single one."""
    folder = tmp_path_factory.mktemp("distributed")
    result = subprocess.run(
        [sys.executable, str(WORKER), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return {"two": [torch.load(folder / f"2-{rank}.pt") for rank in range(2)], "one": torch.load(folder / "1-0.pt")}


def test_the_gradients_are_those_of_one_process_with_all_batches(runs: dict[str, Any]) -> None:
    """Also with a checkpointed language model, packed rows, and where nobody has an image."""
    first, second = runs["two"]
    assert len(runs["one"]) == len(first) == 5
    for one, two, other in zip(runs["one"], first, second, strict=True):
        assert one.keys() <= two.keys() == other.keys()
        for name, gradient in two.items():
            assert torch.equal(gradient, other[name])
            # The mean of two gradients, halved before or after their sum: fp32 rounding of the largest entries.
            expected = one.get(name, torch.zeros_like(gradient))
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6 * (1 + float(expected.abs().max())))


def test_the_tower_learns_from_the_process_that_has_images_and_from_none_else(runs: dict[str, Any]) -> None:
    learns = [
        any(bool(gradient.any()) for name, gradient in step.items() if name.startswith(("vision_tower", "projector")))
        for step in runs["two"][1]
    ]
    assert learns == [True, True, False, True, True]
