"""Puts image features in the places of their placeholder tokens. Pure functions; no module, config or tokenizer.

Shape letters: B batch, S sequence, N images, P features per image, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["merge_image_features", "position_ids_from_mask"]


def merge_image_features(
    embeds_BSD: Tensor, features_NPD: Tensor | None, input_ids_BS: Tensor, image_token_id: int
) -> Tensor:
    """Replaces the embeddings of placeholder tokens by image features, in reading order.

    Args:
        embeds_BSD: token embeddings.
        features_NPD: features of all images of the batch in order; None if there are none.
        input_ids_BS: token ids, which say where the placeholders are.
        image_token_id: the placeholder's id.

    Returns:
        ``[B, S, D]``, a new tensor.

    Raises:
        ValueError: placeholders and features differ in number; the message gives both and the rows' counts.
    """
    mask_BS = input_ids_BS == image_token_id
    num_features = 0 if features_NPD is None else features_NPD.shape[0] * features_NPD.shape[1]
    # One synchronisation per batch; a silent mismatch would shift every later image.
    per_row = mask_BS.sum(1).tolist()
    if sum(per_row) != num_features:
        shape = "no images" if features_NPD is None else f"{features_NPD.shape[0]} images x {features_NPD.shape[1]}"
        raise ValueError(
            f"{sum(per_row)} image placeholder tokens but {num_features} image features ({shape}); placeholders per "
            f"sequence: {per_row}. Whoever built input_ids must write one placeholder per feature: use the "
            "processor, and do not truncate its output."
        )
    if features_NPD is None:
        return embeds_BSD
    features = features_NPD.to(embeds_BSD.dtype).reshape(-1, features_NPD.shape[-1])
    return embeds_BSD.masked_scatter(mask_BS[..., None], features)


def position_ids_from_mask(attention_mask_BS: Tensor) -> Tensor:
    """Positions that count real tokens only, ``[B, S]``: padding on either side does not shift a sequence."""
    return (attention_mask_BS.long().cumsum(-1) - 1).clamp(min=0).to(torch.long)
