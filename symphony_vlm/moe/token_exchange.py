"""Expert parallelism in the forward pass: routed tokens travel to the ranks of their experts and back.

Shape letters: T tokens of this rank, D input size, O output size, E experts of all ranks, K experts per token,
N = T * K rows sent, M rows received.

As in torchtitan, DeepSpeed's AutoEP and transformers' expert parallelism: an all-to-all of the counts, one of the rows,
and one of the results. Nothing is padded or dropped, so a rank may send or receive no row at all; it still takes part
in every exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from symphony_vlm.moe.dispatch import Dispatch

__all__ = ["ExpertShard", "compute_rows"]


class ExpertShard:
    """This rank's place among the ranks that hold the experts of every layer together.

    Args:
        owners: the ranks that together hold all experts, each a contiguous range of them. A group of its own: on the
            one of data parallelism, whose collectives start when gradients are ready, ranks could disagree about the
            order.
        replicas: the ranks that hold the same experts as this one; None: no other.
    """

    def __init__(self, owners: dist.ProcessGroup, replicas: dist.ProcessGroup | None) -> None:
        self.owners = owners
        self.replicas = replicas
        self.size = dist.get_world_size(owners)
        self.rank = dist.get_rank(owners)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertShard:
        return self  # a copied model talks to the same ranks; process groups cannot be copied

    def part_of(self, whole: Tensor) -> Tensor:
        """This rank's experts of a tensor ``[E, ...]``, a view."""
        num_local = len(whole) // self.size
        return whole[self.rank * num_local : (self.rank + 1) * num_local]

    def gather(self, part: Tensor) -> Tensor:
        """The whole of which every owner has a part: ``[E / size, ...] -> [E, ...]``. All owners must call."""
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, part.detach().contiguous(), group=self.owners)
        return torch.cat(parts)

    def forward(
        self,
        experts: Callable[[Tensor, Tensor, Tensor], Tensor],
        x_TD: Tensor,
        weights_TK: Tensor,
        indices_TK: Tensor,
        *,
        num_experts: int,
    ) -> Tensor:
        """What `Experts.forward` does, with the experts of all ranks: ``[T, D] -> [T, O]``.

        To be called by all owners as often, whatever tokens each of them has.

        Args:
            experts: computes this rank's experts, numbered from 0.
            x_TD: tokens.
            weights_TK: fp32 combination weights.
            indices_TK: which of the E experts.
            num_experts: E.
        """
        expert_N = indices_TK.flatten()
        dispatch = Dispatch(indices_TK)  # sorted by expert, the rows are sorted by owner too
        sent_E = torch.zeros(num_experts, dtype=torch.long, device=x_TD.device)
        sent_E.scatter_add_(0, expert_N, torch.ones_like(expert_N))
        received_E = torch.empty_like(sent_E)  # by sender, then by expert of this rank
        dist.all_to_all_single(received_E, sent_E, group=self.owners)
        # The one synchronisation with the host: sizes of memory must be known there.
        send, receive = torch.stack([sent_E, received_E]).unflatten(1, (self.size, -1)).sum(-1).tolist()

        rows_ND = dispatch.fetch(x_TD)
        if torch.is_grad_enabled():
            # The backward pass must come by here on every rank. Whether tokens carry a gradient can differ between
            # ranks: with a frozen language model those of a batch without images do not.
            rows_ND.requires_grad_()
        rows_MD: Tensor = _AllToAll.apply(rows_ND, send, receive, self.owners)  # type: ignore[no-untyped-call]
        expert_M = torch.arange(num_experts // self.size, device=x_TD.device).repeat(self.size)
        expert_M = expert_M.repeat_interleave(received_E, output_size=sum(receive))
        results_MO = compute_rows(experts, rows_MD, expert_M)
        results_NO: Tensor = _AllToAll.apply(results_MO, receive, send, self.owners)  # type: ignore[no-untyped-call]
        return dispatch.combine(results_NO, weights_TK, x_TD.dtype)


def compute_rows(experts: Callable[[Tensor, Tensor, Tensor], Tensor], rows_MD: Tensor, expert_M: Tensor) -> Tensor:
    """Each row by its one expert, unweighted. Weights are applied where the token came from, in fp32."""
    if len(rows_MD):
        return experts(rows_MD, torch.ones_like(expert_M, dtype=torch.float32)[:, None], expert_M[:, None])
    # Not every implementation can do nothing. A row of zeros, of which nothing is kept, leaves the experts with
    # gradients of zero.
    row_1D = rows_MD.sum(0, keepdim=True)
    return experts(row_1D, row_1D.new_ones(1, 1, dtype=torch.float32), expert_M.new_zeros(1, 1))[:0]


class _AllToAll(torch.autograd.Function):
    """``torch.distributed.all_to_all_single`` with its gradient, which takes the same ways back.

    ``torch.distributed.nn.functional`` has one too, deprecated in torch 2.13 in favour of a private module.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        """Sends ``send[r]`` rows to rank r and receives ``receive[r]`` from it."""
        ctx.sizes, ctx.group = (send, receive), group
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of received rows go to who sent them."""
        send, receive = ctx.sizes
        return _all_to_all(gradients[0], receive, send, ctx.group), None, None, None


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    received = rows.new_empty(sum(receive), rows.shape[1])
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received
