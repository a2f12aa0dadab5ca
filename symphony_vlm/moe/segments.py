"""E feed-forward networks on tokens sorted by expert: a contiguous block, and one product at a time, per expert.

Shape letters: T tokens, D input size, F expert hidden size, H = 2F if gated else F, O output size, E experts, K experts
per token, N = T * K routed tokens sorted by expert, n of them one expert's, I and J the two sizes of any linear layer.

Only the products have a backward pass of their own, everything between them is autograd's, over all N rows at once.
Autograd's backward of E products would make a gradient for each expert and then stack them, a copy of as much memory as
all weights take; here each is computed where it stays. Products, sums and their order are autograd's, and so are the
bits of all results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from symphony_vlm.moe.token_exchange import combine

__all__ = ["ExpertParameters", "compute_segments"]


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
    flat_N = indices_TK.flatten()
    # Stable, so that sums keep their order and their rounding.
    order_N = torch.argsort(flat_N, stable=True)
    counts_E = torch.bincount(flat_N, minlength=len(parameters.down_EOF)).tolist()
    with torch.autocast(x_TD.device.type, enabled=False):
        x_ND = x_TD.index_select(0, order_N // indices_TK.shape[1])
        hidden_NF = activate(_linear(x_ND, parameters.up_EHD, parameters.up_bias_EH, counts_E))
        results_NO = _linear(hidden_NF, parameters.down_EOF, parameters.down_bias_EO, counts_E)
        return combine(results_NO, weights_TK, order_N, x_TD.dtype)


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
