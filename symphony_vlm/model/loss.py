"""The training loss: cross entropy of the supervised tokens plus the weighted router losses, nothing else.

Shape letters: B batch, S sequence, D hidden size, V vocabulary, N supervised tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from symphony_vlm.model.aligned_head import aligned_head
from symphony_vlm.moe.recording import RoutingRecorder

__all__ = ["loss_of_step", "only_supervised_logits", "targets_of", "training_loss"]


def targets_of(labels_BS: Tensor, ignore_index: int) -> Tensor:
    """What each position shall predict, ``[B, S]``: the label of the next one."""
    return F.pad(labels_BS[:, 1:], (0, 1), value=ignore_index)


@contextmanager
def only_supervised_logits(head: nn.Module, supervised_BS: Tensor) -> Iterator[None]:
    """Within it the language model's head sees only positions that have something to predict.

    Most positions of a conversation are questions and images. With a large vocabulary their logits are the largest
    tensor of the training step, and nothing reads them. The language model's logits are then ``[1, N, V]``. A hook on
    the head works for every family, with whatever a family does to its logits afterwards (Gemma's soft cap).

    Args:
        head: the language model's output embeddings.
        supervised_BS: bool, where a target is.
    """

    def choose(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_BSD = args[0]
        return (hidden_BSD[supervised_BS.to(hidden_BSD.device)][None], *args[1:])

    handle = head.register_forward_pre_hook(choose)
    try:
        with aligned_head(head):
            yield
    finally:
        handle.remove()


def training_loss(
    logits_NV: Tensor,
    targets_N: Tensor,
    routing: RoutingRecorder | None,
    *,
    ignore_index: int,
    num_items_in_batch: Tensor | int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Total loss and its parts.

    Args:
        logits_NV: logits of positions.
        targets_N: the token that each shall predict, `ignore_index` where nothing is to be learnt; see `targets_of`.
        routing: record of the forward pass, None for a dense model.
        ignore_index: the label left out.
        num_items_in_batch: supervised tokens of the whole optimizer step, over micro-batches (and ranks). With it the
            result is this micro-batch's share of the step's mean, so that accumulation does not weigh a short
            micro-batch like a long one. None: the mean over this batch.

    Returns:
        The scalar total, and detached parts: ``cross_entropy`` (mean over this batch), ``balance``, ``z``, and both
        per layer, unweighted, plus ``router`` (their weighted sum). total = cross_entropy + router, when
        `num_items_in_batch` is None.
    """
    num_supervised = (targets_N != ignore_index).sum()
    summed = F.cross_entropy(
        logits_NV.float(), targets_N.to(logits_NV.device), ignore_index=ignore_index, reduction="sum"
    )
    return loss_of_step(summed, num_supervised, routing, num_items_in_batch=num_items_in_batch)


def loss_of_step(
    summed: Tensor,
    num_supervised: Tensor,
    routing: RoutingRecorder | None,
    *,
    num_items_in_batch: Tensor | int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`training_loss` from the summed cross entropy of `num_supervised` tokens."""
    mean = summed / num_supervised.clamp(min=1)
    parts = {"cross_entropy": mean.detach()}
    total = mean
    if routing is not None:
        losses = routing.losses()
        weighted = routing.weighted_loss(losses)
        parts |= {name: value.detach() for name, value in losses.items()} | {"router": weighted.detach()}
        total = total + weighted
    if num_items_in_batch is not None:
        total = total * (num_supervised / num_items_in_batch)
    return total, parts
