"""E feed-forward networks on tokens sorted by expert: a contiguous block, and one product at a time, per expert.

Shape letters: T tokens, D input size, F expert hidden size, H = 2F if gated else F, O output size, E experts, K experts
per token, N = T * K routed tokens sorted by expert, n of them one expert's.

The backward pass is written out. Autograd's does the same products, but between them it walks over all N rows once for
each operation, long after they have left the cache, and it stacks the experts' gradients, a copy of as much memory as
all weights take. Here a gradient is computed where it stays, and a block is done with before the next one begins.
Products, sums and their order are autograd's, and so are the bits of all results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.activations import SiLUActivation

from symphony_vlm.moe.gradient_memory import GradientMemory

__all__ = ["ExpertParameters", "compute_segments"]


class ExpertParameters(NamedTuple):
    """What E experts are made of, stacked as transformers stacks it; or one expert's part of it, or its gradients."""

    up: Tensor | None
    """``[E, H, D]``."""
    down: Tensor | None
    """``[E, O, F]``."""
    up_bias: Tensor | None
    """``[E, H]``."""
    down_bias: Tensor | None
    """``[E, O]``."""

    def of(self, expert: int) -> ExpertParameters:
        """One expert's, views."""
        return ExpertParameters(*(None if part is None else part[expert] for part in self))


class _Setting(NamedTuple):
    """What is no tensor to be trained."""

    order_N: Tensor
    """Places in the flat ``[T, K]``; by a stable sort, so that sums keep their order and their rounding."""
    token_N: Tensor
    counts: list[int]
    """Tokens of each expert."""
    act_fn: nn.Module
    gated: bool
    memory: GradientMemory

    def blocks(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Of each expert that has tokens: its number, its rows of N, and its tokens."""
        start = 0
        for expert, count in enumerate(self.counts):
            rows = slice(start, start + count)
            start += count
            if count:
                yield expert, rows, self.token_N[rows]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def compute_segments(
    x_TD: Tensor,
    weights_TK: Tensor,
    indices_TK: Tensor,
    parameters: ExpertParameters,
    act_fn: nn.Module,
    *,
    gated: bool,
    memory: GradientMemory,
) -> Tensor:
    """The weighted sum over each token's experts, in the type of the tokens: ``[T, D] -> [T, O]``.

    Once differentiable, and not by the transforms of ``torch.func``. Never compiled, for how many tokens an expert gets
    is known only when they are counted.

    Args:
        x_TD: tokens.
        weights_TK: combination weights, fp32, in which the sum is taken: weights that add up to 1 then give back what
            K equal experts agree on, in 16 bits too.
        indices_TK: which experts.
        parameters: of the experts, in the type of the tokens.
        act_fn: an activation, elementwise; its own parameters, if it has any, get gradients too.
        gated: whether it is applied to half of the first product and multiplies the other half.
        memory: of the gradients of `parameters`.
    """
    assert parameters.down is not None
    flat_N = indices_TK.flatten()
    order_N = torch.argsort(flat_N, stable=True)
    counts = torch.bincount(flat_N, minlength=len(parameters.down)).tolist()
    setting = _Setting(order_N, order_N // indices_TK.shape[1], counts, act_fn, gated, memory)
    tensors = (x_TD, weights_TK, *parameters, *act_fn.parameters())
    with torch.autocast(x_TD.device.type, enabled=False):
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
            output_TO: Tensor = _Segments.apply(setting, *tensors)  # type: ignore[no-untyped-call]
            return output_TO
        return _forward(setting, x_TD, weights_TK, parameters)


def _forward(
    setting: _Setting,
    x_TD: Tensor,
    weights_TK: Tensor,
    parameters: ExpertParameters,
    hidden_NH: Tensor | None = None,
    results_NO: Tensor | None = None,
) -> Tensor:
    """The output. First products and unweighted results are kept where there is a place for them."""
    assert parameters.down is not None
    weights_N = weights_TK.flatten()[setting.order_N]
    dtype = torch.promote_types(x_TD.dtype, weights_TK.dtype)
    sum_TO = x_TD.new_zeros(len(x_TD), parameters.down.shape[1], dtype=dtype)
    for expert, rows, token_n in setting.blocks():
        up, down, up_bias, down_bias = parameters.of(expert)
        hidden_nH = _linear(x_TD.index_select(0, token_n), up, up_bias, None if hidden_NH is None else hidden_NH[rows])
        gate_nF, factor_nF = hidden_nH.chunk(2, dim=-1) if setting.gated else (hidden_nH, None)
        active_nF = setting.act_fn(gate_nF)
        product_nF = active_nF if factor_nF is None else active_nF * factor_nF
        result_nO = _linear(product_nF, down, down_bias, None if results_NO is None else results_NO[rows])
        sum_TO.index_add_(0, token_n, result_nO * weights_N[rows, None])
    return sum_TO.to(x_TD.dtype)


def _linear(x: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor | None) -> Tensor:
    assert weight is not None
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, setting: _Setting, x_TD: Tensor, weights_TK: Tensor, *parts: Any) -> Tensor:
        parameters = ExpertParameters(*parts[:4])
        assert parameters.up is not None and parameters.down is not None
        needs_weights = ctx.needs_input_grad[2]
        hidden_NH = x_TD.new_empty(len(setting.order_N), parameters.up.shape[1])
        results_NO = x_TD.new_empty(len(setting.order_N), parameters.down.shape[1]) if needs_weights else None
        ctx.setting = setting
        ctx.save_for_backward(hidden_NH, results_NO, x_TD, weights_TK, *parts)
        return _forward(setting, x_TD, weights_TK, parameters, hidden_NH, results_NO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_TO.device.type, enabled=False):
            return None, *_Backward(ctx).run(grad_TO)


class _Backward:
    """The backward pass of one layer; gradients that nobody wants are None."""

    def __init__(self, ctx: Any) -> None:
        self.setting: _Setting = ctx.setting
        self.hidden_NH, self.results_NO, self.x_TD, self.weights_TK, *parts = ctx.saved_tensors
        self.parameters = ExpertParameters(*parts[:4])
        _, needs_x, needs_weights, *needs = ctx.needs_input_grad
        empty_like = self.setting.memory.empty_like
        self.grad_x_TD = torch.zeros_like(self.x_TD) if needs_x else None
        self.grad_weights_N = self.weights_TK.new_empty(self.weights_TK.numel()) if needs_weights else None
        wanted = [empty_like(place, part) if needs[place] else None for place, part in enumerate(parts[:4])]
        self.grads = ExpertParameters(*wanted)
        self.of_activation = [part for part, need in zip(parts[4:], needs[4:], strict=True) if need]
        self.grads_of_activation = [torch.zeros_like(part) for part in self.of_activation]
        self.needs_of_activation = needs[4:]
        self.needs_hidden = needs_x or needs[0] or needs[2] or bool(self.of_activation)

    def run(self, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of everything that `_Segments.forward` takes after its setting."""
        order_N, counts = self.setting.order_N, self.setting.counts
        weights_N = self.weights_TK.flatten()[order_N]
        grad_TO = grad_TO.to(torch.promote_types(self.x_TD.dtype, self.weights_TK.dtype))
        for expert, rows, token_n in self.setting.blocks():
            grad_nO = grad_TO.index_select(0, token_n)
            if self.grad_weights_N is not None:
                self.grad_weights_N[rows] = (grad_nO * self.results_NO[rows]).sum(-1)
            self._expert(expert, rows, token_n, (grad_nO * weights_N[rows, None]).to(self.x_TD.dtype))
        for expert in (expert for expert, count in enumerate(counts) if count == 0):
            for grad in self.grads.of(expert):
                if grad is not None:
                    grad.zero_()
        grad_weights_TK = None
        if self.grad_weights_N is not None:
            grad_weights_TK = torch.empty_like(self.grad_weights_N).index_copy_(0, order_N, self.grad_weights_N)
            grad_weights_TK = grad_weights_TK.view_as(self.weights_TK)
        found = iter(self.grads_of_activation)
        of_activation = [next(found) if need else None for need in self.needs_of_activation]
        return self.grad_x_TD, grad_weights_TK, *self.grads, *of_activation

    def _expert(self, expert: int, rows: slice, token_n: Tensor, grad_nO: Tensor) -> None:
        """One expert's gradients from that of its results."""
        weights, grads = self.parameters.of(expert), self.grads.of(expert)
        if not self.needs_hidden and grads.down is None and grads.down_bias is None:
            return
        assert weights.up is not None and weights.down is not None
        hidden_nH = self.hidden_NH[rows]
        gate_nF, factor_nF = hidden_nH.chunk(2, dim=-1) if self.setting.gated else (hidden_nH, None)
        active_nF, backward = _activate(self.setting.act_fn, self.of_activation, gate_nF)
        if grads.down_bias is not None:
            torch.sum(grad_nO, 0, out=grads.down_bias)
        if grads.down is not None:
            torch.mm(grad_nO.T, active_nF if factor_nF is None else active_nF * factor_nF, out=grads.down)
        if not self.needs_hidden:
            return
        grad_nF = grad_nO @ weights.down
        grad_gate_nF, *found = backward(grad_nF if factor_nF is None else grad_nF * factor_nF)
        for total, grad in zip(self.grads_of_activation, found, strict=True):
            total += grad
        grad_nH = grad_gate_nF
        if factor_nF is not None:
            grad_nH = torch.cat([grad_gate_nF, grad_nF.mul_(active_nF)], dim=-1)
        if grads.up_bias is not None:
            torch.sum(grad_nH, 0, out=grads.up_bias)
        if grads.up is not None:
            torch.mm(grad_nH.T, self.x_TD.index_select(0, token_n), out=grads.up)
        if self.grad_x_TD is not None:
            self.grad_x_TD.index_add_(0, token_n, grad_nH @ weights.up)


def _activate(
    act_fn: nn.Module, parameters: list[Tensor], gate_nF: Tensor
) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
    """The activation, and what makes of its gradient those of its input and of its parameters."""
    if type(act_fn) in (nn.SiLU, SiLUActivation):
        # Autograd within a backward pass takes longer to start than this does on a small block.
        return F.silu(gate_nF), lambda grad_nF: [torch.ops.aten.silu_backward(grad_nF, gate_nF)]
    with torch.enable_grad():
        leaf_nF = gate_nF.detach().requires_grad_()
        # A view, because hooks on the inputs of modules, as torch's FLOP counter sets them, bear no leaf in `grad`.
        active_nF = act_fn(leaf_nF.view_as(leaf_nF))
    return active_nF.detach(), lambda grad_nF: torch.autograd.grad(active_nF, [leaf_nF, *parameters], grad_nF)
