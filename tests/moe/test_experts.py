"""Dispatch and combination against the plainest possible loop over tokens."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from symphony_vlm.errors import InputError
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.experts import Experts
from symphony_vlm.moe.layer import SparseMoE

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


# Every implementation and every form of expert, against one loop in double precision.

FORMS: dict[str, dict[str, Any]] = {
    "gated": {"hidden_act": "silu"},
    "gated with biases": {"hidden_act": "gelu_pytorch_tanh", "bias": True},
    "plain": {"hidden_act": "gelu", "gated": False},
    "plain with biases": {"hidden_act": "quick_gelu", "gated": False, "bias": True},
}
ON_A_CPU = ["segments", "grouped_mm", "batched_mm"]


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """``segments`` computes grouped products, as it does on CUDA."""
    monkeypatch.setattr(Experts, "_can_group", lambda self, x_TD: True)


TOLERANCES = {
    # Sums of at most 48 products, each rounded by 6e-8 of its size.
    torch.float32: 1e-6,
    # About eight values on the way are rounded to 8 bits, by 0.002 each: 0.016, doubled for their chance sums.
    torch.bfloat16: 3e-2,
}


def make_experts(form: str, *, output_size: int | None = None, implementation: str = "segments") -> Experts:
    experts = Experts(5, 16, 24, output_size=output_size, implementation=implementation, **FORMS[form])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return experts


def oracle(experts: Experts, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
    up_bias, down_bias = (experts.up_bias, experts.down_proj_bias) if experts.has_bias else (None, None)
    rows = []
    for t, chosen in enumerate(indices_TK.tolist()):
        row = torch.zeros(experts.down_proj.shape[1], dtype=x_TD.dtype)
        for k, e in enumerate(chosen):
            hidden = F.linear(x_TD[t], experts.up_weight[e], None if up_bias is None else up_bias[e])
            half = len(hidden) // 2
            hidden = experts.act_fn(hidden[:half]) * hidden[half:] if experts.has_gate else experts.act_fn(hidden)
            row = row + weights_TK[t, k] * F.linear(
                hidden, experts.down_proj[e], None if down_bias is None else down_bias[e]
            )
        rows.append(row)
    return torch.stack(rows)


def results_of(function: Any, experts: Experts, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and all gradients for fixed inputs; experts 1 and 4 of five are never chosen."""
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(13, n, generator=generator).bfloat16() for n in (16, experts.down_proj.shape[1])]
    weights_TK = torch.rand(13, 2, generator=generator)
    usable = torch.tensor([0, 2, 3])
    indices_TK = torch.stack([usable[torch.randperm(3, generator=generator)[:2]] for _ in range(13)])
    x_TD = draw[0].to(dtype).requires_grad_()
    weights_TK = weights_TK.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    y_TO = function(x_TD, weights_TK, indices_TK)
    (y_TO * draw[1].to(dtype)).sum().backward()
    assert y_TO.dtype == dtype and x_TD.grad is not None and weights_TK.grad is not None
    gradients = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {"output": y_TO, "input": x_TD.grad, "weights": weights_TK.grad, **gradients}


def check_against_the_oracle(experts: Experts, dtype: torch.dtype) -> None:
    experts = experts.to(dtype)
    exact = copy.deepcopy(experts).double()  # of the same rounded weights
    expected = results_of(partial(oracle, exact), exact, torch.float64)
    for name, ours in results_of(experts, experts, dtype).items():
        largest = expected[name].abs().max()
        assert largest > 0.1
        assert (ours.double() - expected[name]).abs().max() <= TOLERANCES[dtype] * largest, name
        if name not in ("output", "input", "weights"):
            assert not ours[[1, 4]].any() and ours[[0, 2, 3]].abs().flatten(1).max(1).values.min() > 0


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("implementation", ["auto", *ON_A_CPU])
def test_every_implementation_equals_the_loop_in_output_and_gradients(
    implementation: str, form: str, dtype: torch.dtype
) -> None:
    check_against_the_oracle(make_experts(form, implementation=implementation), dtype)


@pytest.mark.usefixtures("grouped")
@pytest.mark.parametrize("output_size", [16, 40])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_grouped_products_equal_the_loop_in_output_and_gradients(
    form: str, dtype: torch.dtype, output_size: int
) -> None:
    check_against_the_oracle(make_experts(form, output_size=output_size), dtype)


@pytest.mark.usefixtures("grouped")
@pytest.mark.parametrize("form", FORMS)
def test_grouped_products_of_no_token(form: str) -> None:
    experts = make_experts(form)
    x_TD = torch.empty(0, 16, requires_grad=True)
    y_TD = experts(x_TD, torch.empty(0, 2), torch.empty(0, 2, dtype=torch.long))
    assert y_TD.shape == (0, 16)
    y_TD.sum().backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in experts.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("implementation", ["auto", "grouped_mm"])
def test_the_default_on_cuda_equals_the_segments(implementation: str, form: str) -> None:
    experts = make_experts(form, implementation=implementation).bfloat16().cuda()
    reference = make_experts(form).bfloat16()
    x_TD = torch.randn(64, 16).bfloat16()
    weights_TK, indices_TK = torch.rand(64, 2), torch.randint(0, 2, (64, 2)) + torch.tensor([0, 3])
    ours = experts(x_TD.cuda(), weights_TK.cuda(), indices_TK.cuda()).cpu().float()
    expected = reference(x_TD, weights_TK, indices_TK).float()
    assert (ours - expected).abs().max() <= TOLERANCES[torch.bfloat16] * expected.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_experts_may_end_in_another_width_than_they_begin(form: str, dtype: torch.dtype) -> None:
    check_against_the_oracle(make_experts(form, output_size=40, implementation="auto"), dtype)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_what_an_implementation_cannot_do_is_an_error_and_not_another_result(implementation: str) -> None:
    experts = make_experts("gated", output_size=40, implementation=implementation)
    arguments = (torch.randn(3, 16), torch.rand(3, 2), torch.tensor([[0, 1]] * 3))
    with pytest.raises(InputError, match=f"{implementation}.*as wide at their end"):
        experts(*arguments)


def test_grouped_mm_names_the_widths_that_its_kernel_cannot_read() -> None:
    experts = Experts(3, 6, 10, "silu", implementation="grouped_mm")
    experts.reset(0.1)
    with pytest.raises(InputError, match="multiple of 16 bytes; these experts are 6 and 10 wide"):
        experts(torch.randn(3, 6), torch.rand(3, 2), torch.tensor([[0, 1]] * 3))


def test_an_unknown_implementation_lists_those_there_are() -> None:
    experts = make_experts("gated", implementation="eager")
    with pytest.raises(InputError, match="'eager' is not one of auto, segments, .*grouped_mm"):
        experts(torch.randn(3, 16), torch.rand(3, 2), torch.tensor([[0, 1]] * 3))


def test_the_setting_reaches_the_experts() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "hidden_act": "silu", "layer_index": 0}
    for implementation in ("auto", "grouped_mm"):
        layer = SparseMoE(MoEConfig(experts_implementation=implementation), **sizes)
        assert layer.experts.implementation == implementation


def test_weights_that_add_up_to_one_give_back_a_common_output_in_sixteen_bits() -> None:
    """Equal experts, as after upcycling: the sum over them is taken in fp32 and rounds to what each of them said."""
    experts = make_experts("gated").bfloat16()
    with torch.no_grad():
        for weight in experts.parameters():
            weight.copy_(weight[:1].expand_as(weight))
    x_TD = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    first_T = torch.rand(50, 1, generator=torch.Generator().manual_seed(1))
    alone = experts(x_TD, torch.ones(50, 1), torch.zeros(50, 1, dtype=torch.long))
    both = experts(x_TD, torch.cat([first_T, 1 - first_T], 1), torch.tensor([[0, 0]] * 50))
    assert torch.equal(both, alone)


@pytest.mark.parametrize("implementation", ["segments", "grouped_mm"])
@pytest.mark.parametrize("gated", [True, False])
def test_autocast_reaches_the_products_and_the_gradients_stay_in_fp32(implementation: str, gated: bool) -> None:
    """As of a linear layer: products in bfloat16, weights and their gradients in fp32."""
    torch.manual_seed(0)
    experts = Experts(4, 16, 32, "silu", gated=gated, bias=True, implementation=implementation)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    low = copy.deepcopy(experts).to(torch.bfloat16)
    x_TD, indices_TK = torch.randn(24, 16), torch.stack([torch.randperm(4)[:2] for _ in range(24)])
    weights_TK = torch.rand(24, 2).softmax(-1)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = experts(x_TD, weights_TK, indices_TK)
    output.float().square().sum().backward()
    expected = low(x_TD.bfloat16(), weights_TK, indices_TK)

    # The same products of the same rounded numbers.
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in experts.parameters())
    assert all(weight.grad.abs().sum() > 0 for weight in experts.parameters() if weight.grad is not None)


class _OnCuda:
    """As much of a tensor on CUDA as the choice of an implementation asks for."""

    is_cuda = True
    device = "cuda:0"

    def __init__(self, tokens: int, dtype: torch.dtype) -> None:
        self.tokens, self.dtype = tokens, dtype

    def __len__(self) -> int:
        return self.tokens

    def element_size(self) -> int:
        return self.dtype.itemsize


@pytest.mark.parametrize(
    ("tokens", "trains", "compiling", "dtype", "expected"),
    [
        (1, False, False, torch.bfloat16, "batched_mm"),
        (8, False, False, torch.bfloat16, "grouped"),
        (1, True, False, torch.bfloat16, "grouped"),
        (1, False, True, torch.bfloat16, "grouped"),
        (8, False, True, torch.float32, "batched_mm"),
        (8, True, True, torch.float32, "segments"),
        (8, True, False, torch.float32, "grouped"),
    ],
)
def test_auto_on_cuda_follows_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tokens: int, trains: bool, compiling: bool, dtype: torch.dtype, expected: str
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    x: Any = _OnCuda(tokens, dtype)

    def chosen(experts: Experts) -> str:
        name = experts._fitting_implementation(x)
        return "grouped" if name == "segments" and experts._can_group(x) else name

    with torch.set_grad_enabled(trains):
        assert chosen(Experts(4, 16, 32, "silu")) == expected
        # `batched_mm` computes no experts of another width at their end.
        otherwise = "segments" if compiling else "grouped"
        wider = otherwise if expected == "batched_mm" else expected
        assert chosen(Experts(4, 16, 32, "silu", output_size=24)) == wider
        assert not Experts(4, 6, 10, "silu")._can_group(x)
        double: Any = _OnCuda(tokens, torch.float64)
        assert not Experts(4, 16, 32, "silu")._can_group(double)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert not Experts(4, 16, 32, "silu")._can_group(x)
