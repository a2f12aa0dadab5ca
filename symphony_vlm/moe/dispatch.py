"""Dispatch and combination: routed tokens sorted by expert, and the experts' results brought back to their tokens.

Shape letters: T tokens, K experts per token, N = T * K routed tokens sorted by expert, D and O sizes of rows.

Where a row has gone is known both ways, so neither pass adds rows by index, which on a GPU is atomics in an order of
their own, or a sort and a loop over duplicates (the backward pass of advanced indexing).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Dispatch"]


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
