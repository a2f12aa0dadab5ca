"""The experts of one layer, dispatch and combination included, against the dense limit and against others.

The limit is the faster of two dense feed-forward networks of the same number of operations: in one piece, and in
chunks of tokens that stay in the cache. Nothing sparse needs to be as fast; it is a scale. On a CPU a second scale is
the products alone: those that any layer of E experts computes, one expert after the other on tokens that already lie in
order, without dispatch, activation or sums. What they take beyond the limit is the matrix library's and the memory's:
all E experts' weights are read in both passes, and as many gradients written. Routing is given and about balanced:
routers have a benchmark of their own.

Others: the experts functions of transformers (its ``eager`` as Mixtral has it), and the loops of LibMoE
(github.com/Fsoft-AIC/LibMoE, ``compute_moe``) and CuMo (github.com/SHI-Labs/CuMo, ``smoe_mixtral_helper``), written
anew in their manner. What does not load on a machine is left out, and said so. On a CPU fp32, on CUDA bfloat16, with
the device's own rate at a product of 8192 x 8192 matrices beside it.

Shape letters: T tokens, D hidden size, F expert hidden size, E experts, K experts per token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.measure import Case, Plan, Result, Work
from symphony_vlm.moe import fused
from symphony_vlm.moe.experts import Experts

__all__ = ["PLAN", "cases", "summary"]

PLAN = Plan(rounds=1, alternations=5, seconds=0.01)

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Tokens, weights and indices to the layer's output."""

ON_A_CPU = [(T, 512, 1024, E, 2) for T, E in [*product((64, 1024), (4, 8, 16)), (8192, 8)]]
ON_A_CPU.append((1024, 128, 256, 8, 2))  # as small as the models of studies
ON_CUDA = [
    (8192, 2048, 5632, 4, 2),
    (32768, 2048, 5632, 4, 2),
    (8192, 3072, 8192, 4, 2),
    (32768, 576, 1536, 8, 2),
    (32768, 2048, 1024, 64, 8),
    (32768, 2048, 768, 128, 8),
]
DECODING = [(T, *sizes) for sizes in ((2048, 5632, 4, 2), (2048, 768, 128, 8)) for T in (1, 8, 64)]
MATRIX_SIZE = 8192
CHUNK = 1024


def cases(*, tiny: bool, device: torch.device) -> Iterator[Case]:
    """Sizes of one sparse layer; on CUDA also those of decoding, forward alone."""
    names = ["tokens", "hidden", "expert size", "experts", "chosen"]
    sizes = ON_CUDA if device.type == "cuda" else ON_A_CPU
    sizes = [(32, 16, 24, 4, 2)] if tiny else sizes
    for values in sizes:
        yield from _cases(dict(zip(names, values, strict=True)), device, ("forward", "forward + backward"))
    if device.type == "cuda":
        for values in DECODING:
            yield from _cases(dict(zip(names, values, strict=True)), device, ("forward",))


def _cases(sizes: Mapping[str, int], device: torch.device, passes: Sequence[str]) -> Iterator[Case]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layer = _Layer(sizes, device, dtype)
    for name in passes:
        run = _forward if name == "forward" else _forward_backward
        yield Case(
            settings={**sizes, "pass": name},
            contenders={who: partial(run, layer, *contender) for who, contender in layer.contenders(run).items()},
            limits={"dense": partial(_dense, layer, name), "dense in chunks": partial(_dense, layer, name, CHUNK)},
            references={} if device.type == "cuda" else {"products alone": _products(layer, name)},
            whole=_matrix_product(device) if device.type == "cuda" else None,
            # Sums of up to 2048 products in another order; in bfloat16 the output is also rounded in other places.
            tolerance=1e-5 if dtype == torch.float32 else 3e-2,
        )


def _matrix_product(device: torch.device) -> tuple[str, Work]:
    a, b = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE, device=device, dtype=torch.bfloat16)
    return f"{MATRIX_SIZE}² product", lambda: (a @ b,)


class _Layer:
    """One layer's inputs and weights, and everybody who computes it."""

    def __init__(self, sizes: Mapping[str, int], device: torch.device, dtype: torch.dtype) -> None:
        T, D, size, E, K = sizes.values()
        torch.manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype)

        self.device = device
        self.x_TD, self.grad_TD = draw(T, D).requires_grad_(), draw(T, D)
        chosen = torch.rand(T, E, device=device).topk(K)
        self.weights_TK = chosen.values.div(chosen.values.sum(-1, keepdim=True)).requires_grad_()
        self.indices_TK = chosen.indices
        with torch.device(device):
            self.experts = Experts(E, D, size, "silu").to(dtype)
        self.experts.reset(0.02)
        self.dense_up, self.dense_down = (0.02 * draw(2 * K * size, D), 0.02 * draw(D, K * size))
        for weight in (self.dense_up, self.dense_down):
            weight.requires_grad_()

    def contenders(self, run: Callable[..., Any]) -> dict[str, tuple[Function, Sequence[Tensor]]]:
        """Functions with the weights that they train, ours first; on CUDA those that `run` can run."""
        ours = list(self.experts.parameters())
        if self.device.type == "cuda":
            names = ["grouped_mm", "segments", "batched_mm", "sonicmoe", "deepgemm"]
            if len(self.x_TD) > 64:
                names.remove("batched_mm")  # copies an expert for every token
            loading = {name: (self._implementation(name), ours) for name in names}
            return {name: contender for name, contender in loading.items() if self._loads(run, name, *contender)}
        networks = self._networks()
        separate = list(networks.parameters())
        # Where it cannot be compiled there is a warning, and it would be `segments` under another name.
        names = ["segments", "fused"] if fused.is_available() else ["segments"]
        return {
            **{name: (self._implementation(name), ours) for name in names},
            "HF grouped_mm": (self._implementation("grouped_mm"), ours),
            "HF eager": self._eager(),
            "LibMoE loop": (partial(_libmoe_loop, networks), separate),
            "CuMo loop": (partial(_cumo_loop, networks), separate),
        }

    def _implementation(self, name: str) -> Function:
        def compute(x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
            self.experts.implementation = name
            output_TD: Tensor = self.experts(x_TD, weights_TK, indices_TK)
            return output_TD

        return compute

    def _loads(self, run: Callable[..., Any], name: str, *contender: Any) -> bool:
        try:
            run(self, *contender)
        except Exception as error:
            print(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[:1]}", file=sys.stderr)
            return False
        return True

    def _eager(self) -> tuple[Function, Sequence[Tensor]]:
        E, D, size = self.experts.down_proj.shape
        config = MixtralConfig(hidden_size=D, intermediate_size=size, num_local_experts=E)
        config._experts_implementation = "eager"
        experts = MixtralExperts(config)
        experts.load_state_dict(self.experts.state_dict())
        return (lambda x_TD, weights_TK, indices_TK: experts(x_TD, indices_TK, weights_TK)), list(experts.parameters())

    def _networks(self) -> nn.ModuleList:
        """The experts as modules of their own, as in both loops."""
        networks = nn.ModuleList()
        for gate_up, down in zip(self.experts.gate_up_proj, self.experts.down_proj, strict=True):
            gate, up = gate_up.chunk(2)
            networks.append(_Network(gate, up, down))
        return networks


class _Network(nn.Module):
    def __init__(self, *weights: Tensor) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.Linear(weight.shape[1], weight.shape[0], bias=False) for weight in weights
        )
        for linear, weight in zip(self.children(), weights, strict=True):
            linear.load_state_dict({"weight": weight})

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return hidden


def _libmoe_loop(networks: nn.ModuleList, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
    """A search for each expert's tokens, and its results added by index."""
    results = torch.zeros_like(x_TD)
    for expert, network in enumerate(networks):
        token, place = torch.where(indices_TK == expert)
        if len(token):
            results[token] += weights_TK[token, place, None] * network(x_TD[token])
    return results


def _cumo_loop(networks: nn.ModuleList, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
    """A one-hot mask of all choices, indices as lists, and ``index_add_``."""
    results = torch.zeros_like(x_TD)
    mask_EKT = F.one_hot(indices_TK, len(networks)).permute(2, 1, 0)
    for expert, network in enumerate(networks):
        place, token = torch.where(mask_EKT[expert])
        if len(token):
            places, tokens = place.tolist(), token.tolist()
            results.index_add_(0, token, network(x_TD[tokens]) * weights_TK[tokens, places, None])
    return results


def _forward(layer: _Layer, function: Function, _: Sequence[Tensor]) -> Sequence[Tensor]:
    with torch.no_grad():
        return (function(layer.x_TD, layer.weights_TK, layer.indices_TK),)


def _forward_backward(layer: _Layer, function: Function, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    output_TD = function(layer.x_TD, layer.weights_TK, layer.indices_TK)
    inputs = [layer.x_TD, layer.weights_TK, *weights]
    return output_TD, *torch.autograd.grad(output_TD, inputs, layer.grad_TD)[:2]


def _dense(layer: _Layer, passes: str, chunk: int | None = None) -> Sequence[Tensor]:
    """A dense network of K * F hidden units; in chunks, each goes forward and back before the next one."""
    weights = (layer.dense_up, layer.dense_down)
    totals: list[Tensor] = []
    size = chunk or len(layer.x_TD)
    with torch.set_grad_enabled(passes != "forward"):
        for x_TD, grad_TD in zip(layer.x_TD.detach().split(size), layer.grad_TD.split(size), strict=True):
            gate, up = F.linear(x_TD.requires_grad_(torch.is_grad_enabled()), weights[0]).chunk(2, -1)
            output_TD = F.linear(F.silu(gate) * up, weights[1])
            if passes == "forward":
                continue
            _, *gradients = torch.autograd.grad(output_TD, [x_TD, *weights], grad_TD)
            if totals:
                torch._foreach_add_(totals, gradients)
            totals = totals or gradients
    return totals


def _products(layer: _Layer, passes: str) -> Work:
    """The products of E experts on rows of their own that already lie in order, with places for all results.

    N: routed tokens, n of them one expert's; F: its hidden size; H: 2F.
    """
    E, D, F_ = layer.experts.down_proj.shape
    counts = torch.bincount(layer.indices_TK.flatten(), minlength=E).tolist()

    def rows(size: int) -> tuple[Tensor, ...]:
        return torch.randn(sum(counts), size).split(counts)

    weights = [part.detach() for part in (layer.experts.gate_up_proj, layer.experts.down_proj)]
    forward = list(zip(*weights, rows(D), rows(2 * F_), rows(F_), rows(D), strict=True))
    backward: list[tuple[Tensor, ...]] = []
    if passes != "forward":
        grads = [torch.empty_like(part) for part in weights]
        backward = list(zip(*grads, rows(D), rows(F_), rows(2 * F_), rows(D), strict=True))

    def work() -> Sequence[Tensor]:
        for up, down, x_nD, hidden_nH, active_nF, y_nD in forward:
            torch.mm(x_nD, up.T, out=hidden_nH)
            torch.mm(active_nF, down.T, out=y_nD)
        # Without a backward pass there are no grads.
        for (up, down, x_nD, _, active_nF, _), grads_of_one in zip(forward, backward, strict=False):
            grad_up, grad_down, grad_y_nD, grad_active_nF, grad_hidden_nH, grad_x_nD = grads_of_one
            torch.mm(grad_y_nD.T, active_nF, out=grad_down)
            torch.mm(grad_y_nD, down, out=grad_active_nF)
            torch.mm(grad_hidden_nH.T, x_nD, out=grad_up)
            torch.mm(grad_hidden_nH, up, out=grad_x_nD)
        return ()

    return work


def summary(results: Sequence[tuple[Case, Result]]) -> str:
    """The largest multiple of the limit for each contender; on CUDA, rates and their share of the product's."""
    lines = []
    names = dict.fromkeys(name for case, _ in results for name in case.contenders)
    for name in names:
        by_pass: dict[int | str, float] = {}
        for case, result in results:
            if name in case.contenders and int(case.settings["tokens"]) >= 1024 and result.limit is not None:
                ratio = result.timings[name].seconds / result.limit
                kind = case.settings["pass"]
                by_pass[kind] = max(ratio, by_pass.get(kind, 0.0))
        if by_pass:
            worst = ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in by_pass.items())
            lines.append(f"{name}: at most, from 1024 tokens on, {worst} of the limit")
    lines += [_rates(case, result) for case, result in results if case.whole is not None]
    return "\n".join(lines)


def _rates(case: Case, result: Result) -> str:
    T, D, size, _, K = (int(value) for value in list(case.settings.values())[:5])
    operations = 2 * T * K * 3 * D * size * (1 if case.settings["pass"] == "forward" else 3)
    rate = 2 * MATRIX_SIZE**3 / result.whole
    parts = [
        f"{name} {operations / timing.seconds / 1e12:.0f} TFLOP/s ({operations / timing.seconds / rate:.0%})"
        for name, timing in result.timings.items()
    ]
    sizes = " x ".join(str(value) for value in case.settings.values())
    return f"{sizes}: {', '.join(parts)} of {rate / 1e12:.0f} TFLOP/s"
