"""A head whose vocabulary is no multiple of eight, at the full speed of a GPU.

Shape letters: N tokens, D hidden size, V vocabulary.

Tensor cores read rows of whole 16 bytes. One id too many, as by adding ``<image>`` to a vocabulary of 32,000, and every
product of the head, forward and backward, takes five times as long or more (docs/performance.md). Megatron and nanoGPT
make the vocabulary larger; here weights stay as they are, and rows of zeros are added for the product alone. Weights
that FSDP2 or ZeRO-3 shard are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["aligned_head", "aligned_logits"]

_MULTIPLE = 8
"""Numbers of 16 bits in 16 bytes."""


@contextmanager
def aligned_head(head: nn.Module) -> Iterator[None]:
    """Within it the head's logits come from a product with rows of zeros added, where that is faster.

    Args:
        head: the language model's output embeddings.
    """
    if not _is_misaligned(head):
        yield
        return
    assert isinstance(head, nn.Linear)

    def forward(hidden: Tensor) -> Tensor:
        return aligned_logits(head, hidden)

    vars(head)["forward"] = forward
    try:
        yield
    finally:
        vars(head).pop("forward")


def _is_misaligned(head: nn.Module) -> bool:
    """Whether it is a plain linear layer on a GPU, in nobody else's hands, with rows of logits of no whole 16 bytes."""
    # ZeRO-3 leaves an empty weight between passes, FSDP2 a DTensor.
    if type(head) is not nn.Linear or "forward" in vars(head) or hasattr(head.weight, "full_tensor"):
        return False
    return head.weight.is_cuda and head.weight.shape[0] % _MULTIPLE != 0


def aligned_logits(head: nn.Linear, hidden_ND: Tensor) -> Tensor:
    """``[..., D] -> [..., V]``, a view of rows with a multiple of eight."""
    vocab_size = head.weight.shape[0]
    missing = -vocab_size % _MULTIPLE
    bias = None if head.bias is None else F.pad(head.bias, (0, missing))
    return F.linear(hidden_ND, F.pad(head.weight, (0, 0, 0, missing)), bias)[..., :vocab_size]
