"""Router losses as pure functions: values that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from symphony_vlm.moe.losses import load_balancing_loss, router_z_loss


def cyclic_choices(num_tokens: int, num_experts: int, k: int) -> Tensor:
    """Token t chooses experts t, t + 1, ..., so that every expert is equally busy."""
    return (torch.arange(num_tokens)[:, None] + torch.arange(k)) % num_experts


@pytest.mark.parametrize(("num_experts", "k"), [(2, 1), (4, 1), (4, 2), (8, 2), (8, 8)])
def test_a_balanced_router_gives_exactly_one(num_experts: int, k: int) -> None:
    """1 / E and its multiples are exact in binary for these E, so no tolerance is due."""
    tokens = 4 * num_experts
    loss = load_balancing_loss(
        logits_TE=torch.zeros(tokens, num_experts), indices_TK=cyclic_choices(tokens, num_experts, k)
    )
    assert loss.item() == 1.0


@pytest.mark.parametrize(("num_experts", "k"), [(4, 1), (4, 2), (8, 2)])
def test_a_router_collapsed_on_k_experts_gives_the_number_of_experts_over_k(num_experts: int, k: int) -> None:
    """f_e = P_e = 1 / K on K experts: E * K * (1 / K)^2 = E / K."""
    logits_TE = torch.full((10, num_experts), -100.0)
    logits_TE[:, :k] = 0.0
    loss = load_balancing_loss(logits_TE=logits_TE, indices_TK=torch.arange(k).expand(10, k))
    assert loss.item() == pytest.approx(num_experts / k)


def test_the_loss_equals_the_formula_on_random_input() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(9, 5, generator=generator)
    indices_TK = logits_TE.topk(2).indices
    f_E, p_E = [0.0] * 5, [0.0] * 5
    for logits, indices in zip(logits_TE.tolist(), indices_TK.tolist(), strict=True):
        total = sum(math.exp(z) for z in logits)
        for e in range(5):
            p_E[e] += math.exp(logits[e]) / total / 9
            f_E[e] += indices.count(e) / 18
    expected = 5 * sum(f * p for f, p in zip(f_E, p_E, strict=True))
    assert load_balancing_loss(logits_TE=logits_TE, indices_TK=indices_TK).item() == pytest.approx(expected, rel=1e-6)


def test_a_collapsed_second_choice_is_seen_although_the_first_is_balanced() -> None:
    """With f from first choices alone (as published code has it) f is uniform and the loss 1 whatever P is."""
    num_experts = 4
    first_T = torch.arange(40) % num_experts
    second_T = torch.where(first_T == 0, 1, 0)
    logits_TE = torch.full((40, num_experts), -2.0)
    logits_TE[torch.arange(40), first_T] = 1.0
    logits_TE[torch.arange(40), second_T] = 0.5
    indices_TK = torch.stack([first_T, second_T], dim=1)
    assert torch.equal(logits_TE.topk(2).indices, indices_TK)
    assert load_balancing_loss(logits_TE=logits_TE, indices_TK=indices_TK[:, :1]).item() == pytest.approx(1.0)
    # f = (1/2, 1/4, 1/8, 1/8) and P leans the same way: at least 4 * (sum f_e^2 - slack) = 1.3 here.
    assert load_balancing_loss(logits_TE=logits_TE, indices_TK=indices_TK).item() > 1.1


def test_padding_counts_in_neither_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(12, 4, generator=generator)
    mask_T = torch.rand(12, generator=generator) > 0.4
    indices_TK = logits_TE.topk(2).indices
    masked = load_balancing_loss(logits_TE=logits_TE, indices_TK=indices_TK, token_mask_T=mask_T)
    alone = load_balancing_loss(logits_TE=logits_TE[mask_T], indices_TK=indices_TK[mask_T])
    torch.testing.assert_close(masked, alone)
    torch.testing.assert_close(
        router_z_loss(logits_TE=logits_TE, token_mask_T=mask_T), router_z_loss(logits_TE=logits_TE[mask_T])
    )


def test_a_batch_of_padding_alone_costs_nothing_and_is_no_division_by_zero() -> None:
    logits_TE = torch.randn(6, 4, requires_grad=True)
    mask_T = torch.zeros(6, dtype=torch.bool)
    indices_TK = logits_TE.topk(2).indices
    balance = load_balancing_loss(logits_TE=logits_TE, indices_TK=indices_TK, token_mask_T=mask_T)
    z = router_z_loss(logits_TE=logits_TE, token_mask_T=mask_T)
    assert balance.item() == z.item() == 0.0
    (balance + z).backward()
    assert logits_TE.grad is not None and torch.equal(logits_TE.grad, torch.zeros_like(logits_TE))


def test_the_gradient_of_the_balance_loss_lowers_the_busy_expert() -> None:
    logits_TE = torch.zeros(8, 4, requires_grad=True)
    load_balancing_loss(logits_TE=logits_TE, indices_TK=torch.zeros(8, 1, dtype=torch.long)).backward()
    assert logits_TE.grad is not None
    assert (logits_TE.grad[:, 0] > 0).all() and (logits_TE.grad[:, 1:] < 0).all()


def test_the_z_loss_is_the_mean_square_of_logsumexp() -> None:
    logits_TE = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    expected = sum(math.log(sum(math.exp(z) for z in row)) ** 2 for row in logits_TE.tolist()) / 7
    assert router_z_loss(logits_TE=logits_TE).item() == pytest.approx(expected, rel=1e-6)
    assert router_z_loss(logits_TE=torch.zeros(3, 8)).item() == pytest.approx(math.log(8) ** 2)
