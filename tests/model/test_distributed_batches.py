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


def _text(model: Any) -> torch.Tensor:
    ids = torch.randint(10, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


@pytest.mark.parametrize("world_size", [1, 2])
def test_only_beside_others_does_a_batch_without_images_pass_a_blank_one(
    tiny_moe_model: Any, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world_size)
    passes: list[str] = []
    tiny_moe_model.projector.register_forward_hook(lambda *_: passes.append("pass"))
    tiny_moe_model.train()
    _text(tiny_moe_model).backward()
    vision = [*tiny_moe_model.vision_tower.parameters(), *tiny_moe_model.projector.parameters()]
    if world_size == 1:
        assert not passes and all(parameter.grad is None for parameter in vision)
        return
    assert len(passes) == 1
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in vision)
    # Where nothing there trains, or nothing trains at all, nobody waits.
    with torch.no_grad():
        _text(tiny_moe_model)
    _text(tiny_moe_model.eval())
    for parameter in vision:
        parameter.requires_grad_(False)
    _text(tiny_moe_model.train())
    assert len(passes) == 1


def test_a_batch_without_images_has_a_gradient_where_only_the_projector_trains(tiny_moe_model: Any) -> None:
    tiny_moe_model.requires_grad_(False)
    tiny_moe_model.projector.requires_grad_(True)
    _text(tiny_moe_model.train()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in tiny_moe_model.projector.parameters())


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_tower_learns_from_the_process_that_has_images_and_from_none_else(runs: dict[str, Any]) -> None:
    learns = [
        any(bool(gradient.any()) for name, gradient in step.items() if name.startswith(("vision_tower", "projector")))
        for step in runs["two"][1]
    ]
    assert learns == [True, True, False, True, True]
