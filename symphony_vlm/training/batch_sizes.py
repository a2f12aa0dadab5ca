"""How much is in a batch: what throughput and model FLOPs are counted from.

Counted on the CPU by whoever makes the batch (a data-loader worker), so that the training step does nothing for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from symphony_vlm.data.conversation import IGNORE_INDEX

__all__ = ["BatchSizes", "batch_sizes"]


class BatchSizes(NamedTuple):
    """Numbers of a batch. Placeholders (`data.placeholders`) are no samples."""

    samples: int = 0
    """Records; conversations, where several share a row."""
    tokens: int = 0
    """Real tokens, image features included, without padding."""
    supervised: int = 0
    """Tokens that are predicted."""
    places: int = 0
    """Tokens and padding."""
    images: int = 0
    tiles: int = 0
    """Squares that the vision tower (or its cache) has features of; one an image, but with anyres."""
    lengths: tuple[int, ...] = ()
    """Tokens of each sequence that attends to itself alone: a row, or a document of a packed row."""


def batch_sizes(records: Sequence[Any], batch: Mapping[str, Any]) -> BatchSizes:
    """Counts a batch.

    Args:
        records: what it is made of, rows of several taken apart.
        batch: the collator's output.
    """
    samples = sum(_teaches(record) for record in records)
    pictures = batch.get("pixel_values", batch.get("vision_features"))
    tiles = 0 if pictures is None else len(pictures)
    images = len(batch["image_sizes"]) if "image_sizes" in batch else tiles
    if "input_ids" not in batch:  # image-caption pairs of a contrastive stage
        return BatchSizes(samples=samples, images=images, tiles=tiles)
    lengths = _lengths(batch)
    return BatchSizes(
        samples=samples,
        tokens=sum(lengths),
        supervised=int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()),
        places=batch["input_ids"].numel(),
        images=images,
        tiles=tiles,
        lengths=lengths,
    )


def _teaches(record: Any) -> bool:
    labels = record.get("labels")
    return labels is None or bool((np.asarray(labels) != IGNORE_INDEX).any())


def _lengths(batch: Mapping[str, Any]) -> tuple[int, ...]:
    documents: Tensor | None = batch.get("document_ids")
    if documents is not None:
        counts = [np.unique(row[row >= 0], return_counts=True)[1] for row in documents.numpy()]
        return tuple(np.concatenate(counts).tolist())
    mask: Tensor | None = batch.get("attention_mask")
    if mask is not None:
        return tuple(mask.sum(1).tolist())
    rows, columns = batch["input_ids"].shape
    return (columns,) * rows
