"""Features of an image at several scales (S2, arXiv 2403.13043; ``scales: [1, 3]`` of CuMo and LibMoE). Pure functions.

Shape letters: N images, P features per image, C channels of the encoder, K scales, G features per side, S tiles.

The encoder always sees squares of its own size: an image of three times that size is cut into nine. The maps of each
scale's features are put together again, averaged down to the size of the smallest, and laid on top of each other
channel by channel, so that an image has as many features as before, each K times as wide. The reference is
``multiscale_forward`` of bfshi/scaling_on_scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["multi_scale_features"]


def multi_scale_features(
    encode: Callable[[Tensor], Tensor], pixels_N3HW: Tensor, scales: Sequence[int], image_size: int
) -> Tensor:
    """Features ``[N, P, K * C]``, the channels of the first scale first.

    Features in front of the map (a class token) are averaged over the tiles of a scale.

    Args:
        encode: ``[N, 3, image_size, image_size] -> [N, P, C]``.
        pixels_N3HW: squares of the largest scale's size; smaller scales are interpolated from them (bicubic).
        scales: in units of the encoder's image size, ascending from 1.
        image_size: the encoder's.
    """
    squares = [_split(_resize(pixels_N3HW, scale * image_size), scale) for scale in scales]
    # One pass over all squares: what records the passes (the routers of experts in the tower) sees them together.
    features = encode(torch.cat(squares)).split([len(part) for part in squares])
    side_G = math.isqrt(features[0].shape[1])
    num_prefix = features[0].shape[1] - side_G**2
    maps = [_merge(part[:, num_prefix:], scale, side_G) for part, scale in zip(features, scales, strict=True)]
    # In fp32, as averages over many values; for a scale of 1 nothing happens.
    pooled = [F.interpolate(part.float(), size=(side_G, side_G), mode="area").to(part.dtype) for part in maps]
    patches_NPC = torch.cat(pooled, dim=1).flatten(2).transpose(1, 2)
    if num_prefix == 0:
        return patches_NPC
    prefixes = [
        part[:, :num_prefix].unflatten(0, (scale**2, -1)).mean(0) for part, scale in zip(features, scales, strict=True)
    ]
    return torch.cat([torch.cat(prefixes, dim=-1), patches_NPC], dim=1)


def _resize(pixels_N3HW: Tensor, size: int) -> Tensor:
    resized = F.interpolate(pixels_N3HW.float(), size=(size, size), mode="bicubic")
    return resized.to(pixels_N3HW.dtype)


def _split(pixels_N3HW: Tensor, scale: int) -> Tensor:
    """``[N, 3, scale * h, scale * w] -> [scale² * N, 3, h, w]``, the first tile of all images first."""
    tiles: Tensor = pixels_N3HW.unflatten(3, (scale, -1)).unflatten(2, (scale, -1))
    return tiles.permute(2, 4, 0, 1, 3, 5).flatten(0, 2)


def _merge(features_SPC: Tensor, scale: int, side_G: int) -> Tensor:
    """``[scale² * N, G², C] -> [N, C, scale * G, scale * G]``, the inverse of `_split` for features."""
    tiles: Tensor = features_SPC.unflatten(1, (side_G, side_G)).unflatten(0, (scale, scale, -1))
    return tiles.permute(2, 5, 0, 3, 1, 4).flatten(4, 5).flatten(2, 3)
