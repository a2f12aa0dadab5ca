"""`segments` against autograd's own backward pass of the same products, bit for bit, and where autograd bends it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from symphony_vlm.moe import experts as experts_module
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.experts import Experts
from symphony_vlm.moe.layer import SparseMoE
from symphony_vlm.moe.segments import ExpertParameters, compute_token

NUM_EXPERTS, WIDTH, INNER = 6, 64, 96


def by_autograd(
    x_TD: Tensor,
    weights_TK: Tensor,
    indices_TK: Tensor,
    parameters: ExpertParameters,
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    """The same in operations that autograd differentiates."""
    order_N = torch.argsort(indices_TK.flatten(), stable=True)
    counts_E = torch.bincount(indices_TK.flatten(), minlength=len(parameters.down_EOF))
    blocks = x_TD.repeat_interleave(indices_TK.shape[1], 0)[order_N].split(counts_E.tolist())
    parts = [[None] * len(blocks) if part is None else part.unbind(0) for part in parameters]
    results = []
    for block, up, down, up_bias, down_bias in zip(blocks, *parts, strict=True):
        results.append(F.linear(activate(F.linear(block, up, up_bias)), down, down_bias))
    results_TKO = torch.cat(results)[order_N.argsort()].unflatten(0, indices_TK.shape)
    return (results_TKO * weights_TK[..., None]).sum(1).to(x_TD.dtype)


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Switches all experts to `by_autograd`."""

    def switch() -> None:
        for name in ("compute_segments", "compute_grouped"):
            monkeypatch.setattr(experts_module, name, by_autograd)

    return switch


@pytest.fixture(params=["grouped", "one by one"], autouse=True)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Grouped where they can be, and never."""
    if request.param == "one by one":
        monkeypatch.setattr(Experts, "_can_group", lambda self, x_TD: False)
    chosen: str = request.param
    return chosen


def make_experts(dtype: torch.dtype = torch.float32, **form: Any) -> Experts:
    torch.manual_seed(0)
    form = {"hidden_act": "silu"} | form
    experts = Experts(NUM_EXPERTS, WIDTH, INNER, implementation="segments", **form)
    for weight in experts.parameters():
        nn.init.normal_(weight, std=0.2)
    return experts.to(dtype)


def inputs(num_tokens: int = 70, k: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, weights, and indices among which expert 4 is missing."""
    torch.manual_seed(1)
    usable = torch.tensor([0, 1, 2, 3, 5])
    indices_TK = torch.stack([usable[torch.randperm(5)[:k]] for _ in range(num_tokens)])
    x_TD = torch.randn(num_tokens, WIDTH).to(dtype).requires_grad_()
    return x_TD, torch.rand(num_tokens, k).softmax(-1).requires_grad_(), indices_TK


def results_of(experts: Experts, dtype: torch.dtype, k: int) -> list[Tensor]:
    x_TD, weights_TK, indices_TK = inputs(k=k, dtype=dtype)
    y_TO = experts(x_TD, weights_TK, indices_TK)
    torch.manual_seed(2)
    return [y_TO, *torch.autograd.grad(y_TO, [x_TD, weights_TK, *experts.parameters()], torch.randn_like(y_TO))]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"hidden_act": "gelu_pytorch_tanh", "bias": True, "output_size": 40},
        {"hidden_act": "quick_gelu", "gated": False},
        {"hidden_act": "relu", "gated": False, "bias": True},
    ],
    ids=["swiglu", "gated, biases, another width", "plain", "plain, biases"],
)
def test_output_and_gradients_have_the_bits_of_autograds(
    form: dict[str, Any], dtype: torch.dtype, k: int, before: Callable[[], None], products: str
) -> None:
    experts = make_experts(dtype, **form)
    assert experts._can_group(torch.empty(1, WIDTH, dtype=dtype)) == (products == "grouped" and not experts.has_bias)
    ours = results_of(experts, dtype, k)
    before()
    for found, expected in zip(ours, results_of(experts, dtype, k), strict=True):
        assert found.dtype == expected.dtype and expected.abs().max() > 0.1
        assert torch.equal(found, expected)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
def test_a_single_token_gets_the_bits_that_it_gets_with_gradients(
    bias: bool, dtype: torch.dtype, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = make_experts(dtype, bias=bias, output_size=40)
    tokens = inputs(1, k, dtype)
    expected = experts(*tokens)
    alone = Counter[str]()

    def counted(*arguments: Any) -> Tensor:
        alone["calls"] += 1
        return compute_token(*arguments)

    monkeypatch.setattr(experts_module, "compute_token", counted)
    with torch.no_grad():
        found = experts(*tokens)
    assert alone["calls"] == 1 and expected.abs().max() > 0.1
    assert found.dtype == expected.dtype and torch.equal(found, expected)


def losses_of_twenty_steps() -> list[float]:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "hidden_act": "silu"}
    layers = nn.Sequential(*(SparseMoE(MoEConfig(num_experts=4), **sizes, layer_index=i) for i in range(2)))
    for layer in layers:
        layer.reset(std=0.2)
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-2)
    x_BSD, target_BSD = torch.randn(2, 3, 40, WIDTH)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(layers(x_BSD), target_BSD)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_twenty_training_steps_have_the_losses_they_had_before(before: Callable[[], None]) -> None:
    ours = losses_of_twenty_steps()
    before()
    assert ours == losses_of_twenty_steps()
    assert ours[-1] < 0.5 * ours[0]


@pytest.mark.parametrize("form", [{}, {"hidden_act": "gelu", "gated": False, "bias": True}], ids=["gated", "plain"])
def test_the_written_gradients_are_those_of_finite_differences(form: dict[str, Any]) -> None:
    torch.manual_seed(0)
    experts = Experts(3, 4, 5, implementation="segments", **({"hidden_act": "silu"} | form)).double()
    names = [name for name, _ in experts.named_parameters()]
    indices_TK = torch.tensor([[0, 2], [2, 0], [0, 2], [2, 2]])

    def function(x_TD: Tensor, weights_TK: Tensor, *parts: Tensor) -> Tensor:
        values = dict(zip(names, parts, strict=True))
        return torch.func.functional_call(experts, values, (x_TD, weights_TK, indices_TK))

    shapes = [(4, 4), (4, 2), *(parameter.shape for parameter in experts.parameters())]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(function, tensors)


class Products(TorchDispatchMode):
    """Counts matrix products that have terms, and grouped products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() == "aten::_grouped_mm"
        self.count += func.name() in ("aten::mm", "aten::mm.out") and 0 not in (*args[0].shape, *args[1].shape)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("trained", "needed"),
    [
        # The forward pass has two; the gradients of the hidden units, the input and each weight take one each.
        ("x gate_up_proj down_proj", 6),
        ("x", 4),
        ("gate_up_proj", 4),
        ("down_proj", 3),
        ("weights", 2),
        ("", 2),
    ],
)
def test_what_is_frozen_costs_nothing(trained: str, needed: int, products: str) -> None:
    experts = make_experts()
    x_TD, weights_TK, indices_TK = inputs()
    tensors = {"x": x_TD, "weights": weights_TK, **dict(experts.named_parameters())}
    whole = results_of(experts, torch.float32, 2)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in trained.split())
    with Products() as counter:
        y_TO = experts(x_TD, weights_TK, indices_TK)
        assert y_TO.requires_grad == bool(trained)
        if trained:
            torch.manual_seed(2)
            y_TO.backward(torch.randn_like(y_TO))
    assert counter.count == needed * (1 if products == "grouped" else 5), "an expert without tokens has none"
    for (name, tensor), expected in zip(tensors.items(), whole[1:], strict=True):
        assert torch.equal(tensor.grad, expected) if name in trained.split() else tensor.grad is None


@pytest.mark.parametrize(("frozen", "width"), [("gate_up_proj", WIDTH), ("down_proj", INNER)])
def test_the_input_of_frozen_weights_is_not_kept(frozen: str, width: int) -> None:
    experts, (x_TD, weights_TK, indices_TK) = make_experts(), inputs()

    def kept() -> Counter[tuple[int, ...]]:
        found: Counter[tuple[int, ...]] = Counter()

        def keep(saved: Tensor) -> Tensor:
            found[tuple(saved.shape)] += 1
            return saved

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            experts(x_TD, weights_TK, indices_TK)
        return found

    everything = kept()
    experts.get_parameter(frozen).requires_grad_(False)
    assert everything - kept() == Counter([(indices_TK.numel(), width)])


@pytest.mark.parametrize("use", ["checkpointing", "accumulation", "autocast"])
def test_gradients_have_the_bits_of_autograds_under(use: str, before: Callable[[], None]) -> None:
    def gradients() -> list[Tensor]:
        experts = make_experts(bias=True)
        tensors = inputs()
        for repeat in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=use == "autocast"):
                if use == "checkpointing":
                    y_TO = checkpoint(experts, *tensors, use_reentrant=False)
                else:
                    y_TO = experts(*tensors)
            if repeat == 0 and use != "accumulation":
                experts.zero_grad()
            (y_TO.float() ** 2).sum().backward()
        return [parameter.grad for parameter in experts.parameters()]

    ours = gradients()
    before()
    for found, expected in zip(ours, gradients(), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_an_activation_may_have_parameters_of_its_own(before: Callable[[], None]) -> None:
    def gradients() -> list[Tensor]:
        return results_of(make_experts(hidden_act=nn.PReLU(init=0.1)), torch.float32, 2)

    *ours, slope = gradients()
    before()
    *expected, expected_slope = gradients()
    assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))
    # Summed over experts in another order.
    torch.testing.assert_close(slope, expected_slope, rtol=1e-5, atol=0.0)
    assert slope.abs() > 1


def test_a_compiled_function_leaves_it_out_and_goes_on() -> None:
    experts = make_experts()
    x_TD, weights_TK, indices_TK = inputs()

    def twice(x_TD: Tensor) -> Tensor:
        return experts(experts(x_TD * 2, weights_TK, indices_TK) + 1, weights_TK, indices_TK)

    torch._dynamo.reset()
    compiled = torch.compile(twice, backend="eager")
    gradients = [torch.autograd.grad(function(x_TD).square().sum(), x_TD)[0] for function in (twice, compiled)]
    assert torch.equal(*gradients)
    with torch.inference_mode():
        assert torch.equal(compiled(x_TD), twice(x_TD))


@pytest.mark.parametrize("products", ["one by one"], indirect=True)
def test_a_second_derivative_is_refused(products: str) -> None:
    x_TD, weights_TK, indices_TK = inputs()
    y_TO = make_experts()(x_TD, weights_TK, indices_TK)
    (gradient,) = torch.autograd.grad(y_TO.square().sum(), x_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
