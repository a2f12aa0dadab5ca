"""Dispatch and combination against the plainest possible loop over tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from symphony_vlm.moe.experts import Experts

HIDDEN, INTERMEDIATE = 6, 10


def experts_of(num_experts: int, seed: int = 0) -> Experts:
    experts = Experts(num_experts, HIDDEN, INTERMEDIATE, "silu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
    return experts


def loop_experts(experts: Experts, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
    """One token after the other, one expert after the other."""
    rows = []
    for x_D, weights, indices in zip(x_TD, weights_TK, indices_TK.tolist(), strict=True):
        row = torch.zeros(HIDDEN)
        for weight, e in zip(weights, indices, strict=True):
            gate, up = (experts.gate_up_proj[e] @ x_D).chunk(2)
            row = row + weight * (experts.down_proj[e] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows) if rows else x_TD * weights_TK.sum()


@st.composite
def routings(draw: st.DrawFn) -> tuple[int, Tensor]:
    """(E, indices_TK); a random subset of the experts is never chosen."""
    num_experts = draw(st.integers(1, 6))
    usable = draw(st.lists(st.integers(0, num_experts - 1), min_size=1, unique=True))
    k = draw(st.integers(1, len(usable)))
    num_tokens = draw(st.integers(0, 12))
    rows = [draw(st.permutations(usable))[:k] for _ in range(num_tokens)]
    return num_experts, torch.tensor(rows, dtype=torch.long).reshape(num_tokens, k)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(routings(), st.integers(0, 1000))
def test_experts_equal_the_loop_forward_and_backward(routing: tuple[int, Tensor], seed: int) -> None:
    num_experts, indices_TK = routing
    generator = torch.Generator().manual_seed(seed)
    experts = experts_of(num_experts, seed)
    x_TD = torch.randn(len(indices_TK), HIDDEN, generator=generator)
    weights_TK = torch.rand(indices_TK.shape, generator=generator)
    direction_TD = torch.randn(x_TD.shape, generator=generator)
    results = []
    for function in (experts, lambda *inputs: loop_experts(experts, *inputs)):
        x, weights = x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
        y_TD = function(x, weights, indices_TK)
        gradients = torch.autograd.grad(
            (y_TD * direction_TD).sum(), [x, weights, *experts.parameters()], allow_unused=True, materialize_grads=True
        )
        results.append([y_TD, *gradients])
    for ours, reference in zip(*results, strict=True):
        # Sums of at most 12 x 10 fp32 products of size 1 in another order.
        torch.testing.assert_close(ours, reference, atol=2e-5, rtol=2e-5)


def test_an_expert_that_nobody_chose_gets_a_zero_gradient_and_not_none() -> None:
    """ZeRO and DDP reduce every gradient on every rank; a missing one would make them wait for ever."""
    experts = experts_of(4)
    indices_TK = torch.tensor([[0, 2], [2, 0]])
    experts(torch.randn(2, HIDDEN), torch.full((2, 2), 0.5), indices_TK).sum().backward()
    for weight in experts.parameters():
        assert weight.grad is not None
        unused = [1, 3]
        assert not weight.grad[unused].any() and weight.grad[[0, 2]].abs().sum() > 0


def test_no_token_gives_no_output_and_still_zero_gradients() -> None:
    experts = experts_of(3)
    x_TD = torch.empty(0, HIDDEN, requires_grad=True)
    y_TD = experts(x_TD, torch.empty(0, 2), torch.empty(0, 2, dtype=torch.long))
    assert y_TD.shape == (0, HIDDEN)
    y_TD.sum().backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in experts.parameters())


def test_no_token_is_ever_dropped_even_if_all_choose_the_same_expert() -> None:
    experts = experts_of(4)
    x_TD = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(0))
    y_TD = experts(x_TD, torch.ones(50, 1), torch.full((50, 1), 3))
    gate, up = (x_TD @ experts.gate_up_proj[3].T).chunk(2, dim=-1)
    torch.testing.assert_close(y_TD, (F.silu(gate) * up) @ experts.down_proj[3].T, atol=1e-5, rtol=1e-5)


def test_the_output_has_the_precision_of_the_tokens() -> None:
    experts = experts_of(3).bfloat16()
    x_TD = torch.randn(5, HIDDEN).bfloat16()
    assert experts(x_TD, torch.full((5, 2), 0.5), torch.tensor([[0, 1]] * 5)).dtype == torch.bfloat16


@pytest.mark.parametrize("repeat", range(2))
def test_two_runs_give_the_same_bits(repeat: int) -> None:
    experts = experts_of(4)
    generator = torch.Generator().manual_seed(repeat)
    x_TD, weights_TK = torch.randn(64, HIDDEN, generator=generator), torch.rand(64, 2, generator=generator)
    indices_TK = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(64)])
    assert torch.equal(experts(x_TD, weights_TK, indices_TK), experts(x_TD, weights_TK, indices_TK))
