"""Dispatch and combination: routed tokens sorted by expert, and the experts' results brought back to their tokens.

Shape letters: T tokens, K experts per token, N = T * K routed tokens sorted by expert, D and O sizes of rows; t and n
are pieces of T and N.

Where a row has gone is known both ways, so neither pass adds rows by index, which on a GPU is atomics in an order of
their own, or a sort and a loop over duplicates (the backward pass of advanced indexing). On a CPU rows are combined in
pieces that stay in the cache between one operation and the next, to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Dispatch"]

PIECE = 64
"""Tokens that are combined at once on a CPU: with rows of 512, results and sums take less than half a megabyte."""


class Dispatch:
    """Where T tokens go that have K experts each.

    Args:
        indices_TK: which experts.
    """

    def __init__(self, indices_TK: Tensor) -> None:
        # Stable, so that sums keep their order and their rounding. In 16 bits, a quarter of the passes of a radix sort.
        self.expert_N, self.order_N = torch.sort(indices_TK.flatten().short(), stable=True)
        """The expert of every row; and which of the flat routed tokens it is."""
        places_N = torch.arange(self.order_N.numel(), device=indices_TK.device)
        self.place_TK = torch.empty_like(self.order_N).scatter_(0, self.order_N, places_N).view(indices_TK.shape)
        """The row of every routed token."""

    def fetch(self, x_TD: Tensor) -> Tensor:
        """A row for each expert of each token, sorted by expert: ``[T, D] -> [N, D]``."""
        return _take_rows(x_TD, self.order_N // self.place_TK.shape[1], self.place_TK)

    def combine(self, results_NO: Tensor, weights_TK: Tensor, dtype: torch.dtype) -> Tensor:
        """Weighted sum over each token's experts: ``[N, O] -> [T, O]``.

        In fp32: weights that add up to 1 then give back what K equal experts agree on, in 16 bits too.

        Args:
            results_NO: of the experts.
            weights_TK: fp32 combination weights.
            dtype: of the result.
        """
        if results_NO.device.type == "cpu" and not torch.compiler.is_compiling():
            return _combine_in_pieces(results_NO, weights_TK, self.place_TK, self.order_N).to(dtype)
        results_NO = _take_rows(results_NO, self.place_TK.flatten(), self.order_N[:, None])
        summed_TO: Tensor = (results_NO.unflatten(0, weights_TK.shape) * weights_TK[..., None]).sum(1)
        return summed_TO.to(dtype)


class _TakeRows(torch.autograd.Function):
    """``index_select`` that is told where each row went: its backward pass takes them from there and adds them up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index_N: Tensor, places_MJ: Tensor) -> Tensor:
        """``[M, D] -> [N, D]``; `places_MJ` are the J places that have row m."""
        ctx.save_for_backward(places_MJ)
        return rows.index_select(0, index_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Sums of 16 bits are taken in fp32 and rounded once."""
        (places_MJ,) = ctx.saved_tensors
        grad_ND = grads[0].index_select(0, places_MJ.flatten())
        return (grad_ND if places_MJ.shape[1] == 1 else grad_ND.unflatten(0, places_MJ.shape).sum(1)), None, None


_take_rows: Callable[..., Tensor] = _TakeRows.apply


class _CombineInPieces(torch.autograd.Function):
    """The weighted sums of `Dispatch.combine` and their gradients, some tokens after the others."""

    @staticmethod
    def forward(ctx: Any, results_NO: Tensor, weights_TK: Tensor, place_TK: Tensor, order_N: Tensor) -> Tensor:
        ctx.save_for_backward(results_NO, weights_TK, place_TK, order_N)
        dtype = torch.promote_types(results_NO.dtype, weights_TK.dtype)
        summed_TO = results_NO.new_empty(len(weights_TK), results_NO.shape[1], dtype=dtype)
        pieces = zip(*(part.split(PIECE) for part in (place_TK, weights_TK, summed_TO)), strict=True)
        for place_tK, weights_tK, summed_tO in pieces:
            results_tKO = results_NO.index_select(0, place_tK.flatten()).unflatten(0, place_tK.shape)
            torch.sum(results_tKO * weights_tK[..., None], 1, out=summed_tO)
        return summed_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, Tensor, None, None]:
        results_NO, weights_TK, place_TK, order_N = ctx.saved_tensors
        num_chosen = weights_TK.shape[1]
        weights_N1 = weights_TK.flatten().index_select(0, order_N)[:, None]
        grad_results_NO, grad_weights_N = torch.empty_like(results_NO), torch.empty_like(weights_N1[:, 0])
        parts = (order_N // num_chosen, weights_N1, results_NO, grad_results_NO, grad_weights_N)
        for token_n, weights_n1, results_nO, grad_results_nO, grad_weights_n in zip(
            *(part.split(PIECE * num_chosen) for part in parts), strict=True
        ):
            grad_nO = grad_TO.index_select(0, token_n)
            torch.mul(grad_nO, weights_n1, out=grad_results_nO)
            torch.sum(grad_nO.mul_(results_nO), 1, out=grad_weights_n)
        return grad_results_NO, grad_weights_N.index_select(0, place_TK.flatten()).view_as(weights_TK), None, None


_combine_in_pieces: Callable[..., Tensor] = _CombineInPieces.apply
