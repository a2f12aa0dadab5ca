"""Gates by themselves: the cosine gate against its formula, initialisation, edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.gate import CosineGate, LinearGate, make_gate

HIDDEN, NUM_EXPERTS, NUM_TOKENS = 12, 5, 9


def gate_of(kind: str = "cosine", *, seed: int = 0, **settings: Any) -> LinearGate | CosineGate:
    gate = make_gate(MoEConfig(**({"num_experts": NUM_EXPERTS, "gate": kind} | settings)), HIDDEN)
    gate.reset(torch.Generator().manual_seed(seed))
    return gate


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(NUM_TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))


def cosine_logits(gate: CosineGate, x_D: Tensor, temperature: float) -> list[float]:
    """XMoE for one token, in Python's doubles: cos(P x, v_e) / temperature."""

    def normalised(values: list[float]) -> list[float]:
        length = math.sqrt(sum(v * v for v in values))
        return [v / length for v in values]

    projected = [sum(p * float(x) for p, x in zip(row, x_D, strict=True)) for row in gate.projection.tolist()]
    token = normalised(projected)
    experts = [normalised(row) for row in gate.embeddings.tolist()]
    return [sum(a * b for a, b in zip(token, expert, strict=True)) / temperature for expert in experts]


@pytest.mark.parametrize("temperature", [0.3, 0.07])
def test_the_cosine_gate_equals_its_formula(temperature: float) -> None:
    gate = gate_of(cosine_temperature=temperature)
    assert isinstance(gate, CosineGate)
    logits_TE = gate(tokens())
    expected = [cosine_logits(gate, x_D, temperature) for x_D in tokens()]
    # Cosines carry a few fp32 roundings, 1e-6 at most, and are divided by the temperature.
    torch.testing.assert_close(logits_TE, torch.tensor(expected), atol=1e-6 / temperature, rtol=0)
    assert logits_TE.abs().max() <= (1 + 1e-6) / temperature


def test_lengths_do_not_count() -> None:
    """Neither a loud token nor an expert with large weights changes a cosine."""
    gate = gate_of()
    assert isinstance(gate, CosineGate)
    before_TE = gate(tokens())
    with torch.no_grad():
        gate.embeddings *= torch.arange(1.0, NUM_EXPERTS + 1)[:, None]
        gate.projection *= 3
    # Fresh lengths are about 0.06, a factor of 60,000 above the shortest length; rounding of fp32 remains.
    torch.testing.assert_close(gate(7 * tokens()), before_TE, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("num_experts", "cosine_dim", "size"), [(4, None, 8), (16, None, 8), (64, None, 32), (4, 3, 3)]
)
def test_the_routing_space_has_the_documented_size(num_experts: int, cosine_dim: int | None, size: int) -> None:
    gate = gate_of(num_experts=num_experts, cosine_dim=cosine_dim)
    assert isinstance(gate, CosineGate)
    assert gate.projection.shape == (size, HIDDEN) and gate.embeddings.shape == (num_experts, size)


def test_a_temperature_on_request_is_learnt_from_its_setting_on() -> None:
    fixed, learnt = (
        gate_of(cosine_temperature=0.25),
        gate_of(cosine_temperature=0.25, cosine_learnable_temperature=True),
    )
    assert isinstance(learnt, CosineGate) and learnt.log_temperature is not None
    # exp(log(0.25)) in fp32.
    torch.testing.assert_close(learnt(tokens()), fixed(tokens()), atol=0, rtol=1e-6)
    learnt(tokens()).square().sum().backward()
    assert learnt.log_temperature.grad is not None and learnt.log_temperature.grad != 0
    assert {name for name, _ in fixed.named_parameters()} == {"projection", "embeddings"}


def test_a_token_of_zeros_has_equal_logits_and_a_finite_gradient() -> None:
    x_TD = torch.zeros(2, HIDDEN, requires_grad=True)
    logits_TE = gate_of()(x_TD)
    assert not logits_TE.any()
    logits_TE[:, 0].sum().backward()
    assert x_TD.grad is not None and x_TD.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_fresh_weights_follow_from_the_generator_and_have_the_documented_width(kind: str) -> None:
    settings = {"num_experts": 64, "cosine_dim": 64}
    gates = [gate_of(kind, seed=seed, **settings) for seed in (0, 0, 1)]
    for first, again, other in zip(*(gate.parameters() for gate in gates), strict=True):
        assert torch.equal(first, again) and not torch.equal(first, other)
        # 768 draws or more: a standard error of 2.6 %; four of them.
        assert float(first.detach().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_weights_from_a_checkpoint_are_kept(kind: str) -> None:
    gate = gate_of(kind, cosine_learnable_temperature=True)
    for number, parameter in enumerate(gate.parameters()):
        parameter.data.fill_(number)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    gate.reset()
    for number, parameter in enumerate(gate.parameters()):
        assert torch.equal(parameter, torch.full_like(parameter, number))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_cast_gate_keeps_all_its_bits(kind: str, cast: torch.dtype) -> None:
    gate = gate_of(kind, cosine_learnable_temperature=True)
    before = [parameter.detach().clone() for parameter in gate.parameters()]
    gate.to(cast)
    for parameter, old in zip(gate.parameters(), before, strict=True):
        assert parameter.dtype == torch.float32 and torch.equal(parameter, old)
    assert gate(tokens().bfloat16()).dtype == torch.float32
