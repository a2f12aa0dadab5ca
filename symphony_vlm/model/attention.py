"""Attention within documents: PyTorch's fused attention on one document of a packed batch after the other.

Shape letters: B rows, H heads, S tokens of a row, T = B * S, L tokens of a document, d size of a head.

A mask that keeps the documents of a row apart costs what attention over the whole row costs, several times what is
needed, and on most devices it rules the fast kernels out. Here every document is attended to by itself, with the
kernel's own causal mask. Without documents the function is transformers' ``sdpa``, masks included.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from symphony_vlm.moe.documents import Documents, window_mask

__all__ = ["BY_DOCUMENT", "attention_by_document", "document_arguments", "sdpa_by_document"]

BY_DOCUMENT = "sdpa_by_document"
"""Name of `sdpa_by_document` among the attention implementations of transformers."""


def sdpa_by_document(
    module: nn.Module,
    query_BHSd: Tensor,
    key_BHSd: Tensor,
    value_BHSd: Tensor,
    attention_mask: Tensor | None,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers (`AttentionInterface`).

    Args:
        module: the attention layer.
        query_BHSd: queries.
        key_BHSd: keys, of fewer heads where queries share them.
        value_BHSd: values, likewise.
        attention_mask: used where there are no documents.
        documents: of the batch; None: ``sdpa``.
        sliding_window: how many tokens, itself included, a token of this layer sees.
        kwargs: of ``sdpa``, e.g. dropout and scaling.

    Returns:
        ``[B, S, H, d]``, and None in the place of the probabilities.
    """
    if documents is None:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query_BHSd, key_BHSd, value_BHSd, attention_mask, sliding_window=sliding_window, **kwargs
        )
        return output
    # `split` and not slices: the backward of a slice is a zero tensor of the size of the whole, for each document.
    pieces = [_in_one_row(states).split(documents.lengths, dim=2) for states in (query_BHSd, key_BHSd, value_BHSd)]
    outputs = []
    for query, key, value in zip(*pieces, strict=True):
        mask = window_mask(query.shape[2], sliding_window, query.device)
        outputs.append(sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1).view(*documents.ids_BS.shape, *outputs[0].shape[2:]), None


def _in_one_row(states_BHSd: Tensor) -> Tensor:
    """``[B, H, S, d] -> [1, H, T, d]``; a view, as decoder layers keep a token's heads side by side."""
    return states_BHSd.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def document_arguments(documents: Documents, language_model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of a language model's forward pass that keep documents apart, whatever its attention is.

    ``sdpa`` and ``eager`` get a mask across the row, which transformers makes of positions that begin again, flash
    attention the places where documents begin.
    """
    implementation = language_model.config._attn_implementation
    arguments: dict[str, Any] = {"documents": documents, "position_ids": documents.position_ids_BS}
    # With a cache transformers does not look for documents among the positions.
    arguments |= {"attention_mask": None, "use_cache": False}
    if implementation == BY_DOCUMENT:
        # Taken as it is where it has four dimensions: no mask across the row is made.
        arguments["attention_mask"] = documents.is_real_BS[:, None, None]
    elif implementation.startswith("flash_attention"):
        arguments |= documents.flash_attention_arguments
    return arguments


@contextmanager
def attention_by_document(language_model: PreTrainedModel) -> Iterator[None]:
    """Lets a language model with ``sdpa`` attend document by document; any other implementation stays.

    Around the backward pass too: activation checkpointing runs attention again there.
    """
    before = language_model.config._attn_implementation
    if before == "sdpa":
        language_model.set_attn_implementation(BY_DOCUMENT)
    try:
        yield
    finally:
        if before == "sdpa":
            language_model.set_attn_implementation(before)


AttentionInterface.register(BY_DOCUMENT, sdpa_by_document)
AttentionMaskInterface.register(BY_DOCUMENT, sdpa_mask)
