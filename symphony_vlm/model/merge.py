"""Puts image features in the places of their placeholder tokens. Pure functions; no module, config or tokenizer.

Shape letters: B batch, S sequence, N images, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["images_of_rows", "merge_image_features", "position_ids_from_mask"]


def merge_image_features(
    embeds_BSD: Tensor, image_features: Sequence[Tensor] | Tensor | None, input_ids_BS: Tensor, image_token_id: int
) -> Tensor:
    """Replaces the embeddings of placeholder tokens by image features, in reading order.

    Args:
        embeds_BSD: token embeddings.
        image_features: of each image of the batch in order its features ``[n_i, D]``; None if there are no images.
        input_ids_BS: token ids, which say where the placeholders are.
        image_token_id: the placeholder's id.

    Returns:
        ``[B, S, D]``, a new tensor.

    Raises:
        ValueError: placeholders and features differ in number; the message gives both and the rows' counts.
    """
    mask_BS = input_ids_BS == image_token_id
    counts = [] if image_features is None else [len(features) for features in image_features]
    # One synchronisation per batch; a silent mismatch would shift every later image.
    per_row = mask_BS.sum(1).tolist()
    if sum(per_row) != sum(counts):
        raise ValueError(
            f"{sum(per_row)} image placeholder tokens but {sum(counts)} image features ({_describe(counts)}); "
            f"placeholders per sequence: {per_row}. Whoever built input_ids must write one placeholder per feature: "
            "use the processor, and do not truncate its output."
        )
    if image_features is None or not counts:
        return embeds_BSD
    features = torch.cat(list(image_features)).to(embeds_BSD.dtype)
    return embeds_BSD.masked_scatter(mask_BS[..., None], features)


def _describe(counts: Sequence[int]) -> str:
    if not counts:
        return "no images"
    if len(set(counts)) == 1:
        return f"{len(counts)} images x {counts[0]}"
    return f"images of {', '.join(map(str, counts))}"


def images_of_rows(placeholders_per_row: Sequence[int], tokens_per_image: Sequence[int]) -> list[range]:
    """Which images, counted over the batch, stand in each row.

    Args:
        placeholders_per_row: how many placeholder tokens each row has.
        tokens_per_image: how many of them each image takes, in reading order.

    Raises:
        ValueError: no whole number of images fills a row.
    """
    rows: list[range] = []
    start = 0
    for wanted in placeholders_per_row:
        stop, taken = start, 0
        while taken < wanted and stop < len(tokens_per_image):
            taken += tokens_per_image[stop]
            stop += 1
        if taken != wanted:
            raise ValueError(
                f"{wanted} image placeholder tokens in row {len(rows)}, but the images from number {start} on have "
                f"{list(tokens_per_image[start:stop])} features"
            )
        rows.append(range(start, stop))
        start = stop
    return rows


def position_ids_from_mask(attention_mask_BS: Tensor) -> Tensor:
    """Positions that count real tokens only, ``[B, S]``: padding on either side does not shift a sequence."""
    return (attention_mask_BS.long().cumsum(-1) - 1).clamp(min=0).to(torch.long)
