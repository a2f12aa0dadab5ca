"""E feed-forward networks on tokens sorted by expert, a contiguous block for each.

Shape letters: T tokens, D input size, F expert hidden size, H = 2F if gated else F, O output size, E experts, K experts
per token, N = T * K routed tokens sorted by expert, n of them one expert's, I and J the two sizes of any linear layer.

The products of a layer are one grouped product, where the device has one, or E products one after the other. Those have
a backward pass of their own: autograd's would make a gradient for each expert and then stack them, a copy of as much
memory as all weights take; here each is computed where it stays. Products, sums and their order are autograd's, and so
are the bits of all results. Everything between the products is autograd's, over all N rows at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from symphony_vlm.moe.dispatch import Dispatch

__all__ = ["ExpertParameters", "compute_grouped", "compute_segments", "compute_token"]


class ExpertParameters(NamedTuple):
    """What E experts are made of, stacked as transformers stacks it."""

    up_EHD: Tensor
    down_EOF: Tensor
    up_bias_EH: Tensor | None = None
    down_bias_EO: Tensor | None = None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def compute_segments(
    x_TD: Tensor,
    weights_TK: Tensor,
    indices_TK: Tensor,
    parameters: ExpertParameters,
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    """The weighted sum over each token's experts, in the type of the tokens: ``[T, D] -> [T, O]``.

    Once differentiable, and not by the transforms of ``torch.func``. Never compiled, for how many tokens an expert gets
    is known only when they are counted.

    Args:
        x_TD: tokens.
        weights_TK: combination weights, fp32, in which the sum is taken.
        indices_TK: which experts.
        parameters: of the experts, in the type of the tokens.
        activate: from the first product to the second, ``[N, H] -> [N, F]``, row by row.
    """
    counts_E = torch.bincount(indices_TK.flatten(), minlength=len(parameters.down_EOF)).tolist()

    def linear(x_NI: Tensor, weight_EJI: Tensor, bias_EJ: Tensor | None) -> Tensor:
        return _linear(x_NI, weight_EJI, bias_EJ, counts_E)

    return _compute(x_TD, weights_TK, Dispatch(indices_TK), parameters, activate, linear)


def compute_grouped(
    x_TD: Tensor,
    weights_TK: Tensor,
    indices_TK: Tensor,
    parameters: ExpertParameters,
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    """`compute_segments` by grouped products: nothing waits for the device, and no shape hangs on values.

    By torch 2.10 or later, with rows of multiples of 16 bytes, on a CPU or on CUDA from compute capability 8.0 on;
    compiled, in bfloat16 alone. On a CPU the bits are those of `compute_segments`, but for biases.
    """
    dispatch = Dispatch(indices_TK)
    experts_E = torch.arange(len(parameters.down_EOF), device=x_TD.device)
    ends_E = torch.searchsorted(dispatch.expert_N, experts_E.to(dispatch.expert_N.dtype), right=True, out_int32=True)

    def linear(x_NI: Tensor, weight_EJI: Tensor, bias_EJ: Tensor | None) -> Tensor:
        y_NJ = F.grouped_mm(x_NI, weight_EJI.mT, offs=ends_E)
        if bias_EJ is None:
            return y_NJ
        # As a product, whose backward pass is one too: that of fetching biases adds all rows of an expert one by one.
        one_hot_NE = (dispatch.expert_N[:, None] == experts_E).to(bias_EJ.dtype)
        return torch.addmm(y_NJ, one_hot_NE, bias_EJ)

    return _compute(x_TD, weights_TK, dispatch, parameters, activate, linear)


def compute_token(
    x_1D: Tensor,
    weights_1K: Tensor,
    indices_1K: Tensor,
    parameters: ExpertParameters,
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    """`compute_segments` of a single token, to the bit: nothing is to be sorted. For a CPU, without gradients.

    Those would be as large as the weights of all experts, K times.
    """
    chosen = indices_1K[0].tolist()

    def linear(x_KI: Tensor, weight_EJI: Tensor, bias_EJ: Tensor | None) -> Tensor:
        biases = [None if bias_EJ is None else bias_EJ[expert] for expert in chosen]
        rows = zip(x_KI.split(1), chosen, biases, strict=True)
        return torch.cat([F.linear(x_1I, weight_EJI[expert], bias_J) for x_1I, expert, bias_J in rows])

    with torch.autocast(x_1D.device.type, enabled=False):
        x_KD = x_1D.expand(len(chosen), -1)
        hidden_KF = activate(linear(x_KD, parameters.up_EHD, parameters.up_bias_EH))
        results_KO = linear(hidden_KF, parameters.down_EOF, parameters.down_bias_EO)
        return (results_KO * weights_1K.T).sum(0, keepdim=True).to(x_1D.dtype)


def _compute(
    x_TD: Tensor,
    weights_TK: Tensor,
    dispatch: Dispatch,
    parameters: ExpertParameters,
    activate: Callable[[Tensor], Tensor],
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    with torch.autocast(x_TD.device.type, enabled=False):
        x_ND = dispatch.fetch(x_TD)
        hidden_NF = activate(linear(x_ND, parameters.up_EHD, parameters.up_bias_EH))
        results_NO = linear(hidden_NF, parameters.down_EOF, parameters.down_bias_EO)
        return dispatch.combine(results_NO, weights_TK, x_TD.dtype)


class _Linear(torch.autograd.Function):
    """A linear layer for each expert's block; of the gradients, those that somebody wants."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_EJI: Tensor, bias_EJ: Tensor | None, counts_E: list[int]) -> Tensor:
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x_NI if needs_weight else None, weight_EJI if needs_x else None)
        ctx.counts_E = counts_E
        y_NJ = x_NI.new_empty(len(x_NI), weight_EJI.shape[1])
        # All views at once: one by one they take as long as the products of a few tokens.
        blocks = zip(x_NI.split(counts_E), weight_EJI.mT.unbind(), y_NJ.split(counts_E), strict=True)
        if bias_EJ is None:
            for x_nI, weight_IJ, y_nJ in blocks:
                torch.mm(x_nI, weight_IJ, out=y_nJ)
        else:
            for (x_nI, weight_IJ, y_nJ), bias_J in zip(blocks, bias_EJ.unbind(), strict=True):
                torch.addmm(bias_J, x_nI, weight_IJ, out=y_nJ)
        return y_NJ

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NJ: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_EJI = ctx.saved_tensors
        blocks = grad_NJ.split(ctx.counts_E)
        grad_x_NI = grad_weight_EJI = grad_bias_EJ = None
        if weight_EJI is not None:
            grad_x_NI = grad_NJ.new_empty(len(grad_NJ), weight_EJI.shape[2])
            places = grad_x_NI.split(ctx.counts_E)
            for grad_nJ, weight_JI, place_nI in zip(blocks, weight_EJI.unbind(), places, strict=True):
                torch.mm(grad_nJ, weight_JI, out=place_nI)
        if x_NI is not None:
            grad_weight_EJI = x_NI.new_empty(len(blocks), grad_NJ.shape[1], x_NI.shape[1])
            # Of an expert without tokens the product has no terms, and is zero.
            for grad_nJ, x_nI, place_JI in zip(blocks, x_NI.split(ctx.counts_E), grad_weight_EJI.unbind(), strict=True):
                torch.mm(grad_nJ.T, x_nI, out=place_JI)
        if ctx.needs_input_grad[2]:
            grad_bias_EJ = torch.stack([grad_nJ.sum(0) for grad_nJ in blocks])
        return grad_x_NI, grad_weight_EJI, grad_bias_EJ, None


_linear: Callable[..., Tensor] = _Linear.apply
