"""The training loss: cross entropy of the supervised tokens plus the weighted router losses, nothing else.

Shape letters: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from symphony_vlm.moe.recording import RoutingRecorder

__all__ = ["training_loss"]


def training_loss(
    logits_BSV: Tensor,
    labels_BS: Tensor,
    routing: RoutingRecorder | None,
    *,
    ignore_index: int,
    num_items_in_batch: Tensor | int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Total loss and its parts.

    Args:
        logits_BSV: logits; position s predicts token s + 1.
        labels_BS: token ids, `ignore_index` where nothing is to be learnt.
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
    targets_BS = labels_BS[:, 1:]
    num_supervised = (targets_BS != ignore_index).sum()
    summed = F.cross_entropy(
        logits_BSV[:, :-1].flatten(0, 1).float(),
        targets_BS.flatten().to(logits_BSV.device),
        ignore_index=ignore_index,
        reduction="sum",
    )
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
