"""Prepares images for a vision tower with Pillow alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from symphony_vlm.errors import InputError
from symphony_vlm.model.registration import register

__all__ = ["SymphonyImageProcessor"]

RESIZE_MODES = ("pad", "crop", "stretch")


class SymphonyImageProcessor(BaseImageProcessor):
    """RGB images to normalised squares, ``[N, 3, size, size]``.

    Args:
        image_size: side of the square, in pixels.
        image_mean: per channel, of values in [0, 1].
        image_std: per channel.
        resize_mode: ``pad`` (LLaVA-1.5: centred on a square of the mean colour, then resized), ``crop`` (short side
            resized, centre cropped: CLIP) or ``stretch`` (aspect ratio not kept).
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def __init__(
        self,
        image_size: int = 336,
        image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
        resize_mode: Literal["pad", "crop", "stretch"] = "pad",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if resize_mode not in RESIZE_MODES:
            raise InputError(f"{resize_mode!r} is not one of {', '.join(RESIZE_MODES)}", where="resize_mode")
        self.image_size = image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.resize_mode = resize_mode

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Images (one or a list; Pillow or uint8 ``[H, W, 3]`` arrays) to ``pixel_values`` fp32 ``[N, 3, H, W]``."""
        if isinstance(images, (Image.Image, np.ndarray)):
            images = [images]
        squares = np.stack([np.asarray(self.to_square(_as_pillow(image))) for image in images])
        pixels = torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 255.0
        mean = torch.tensor(self.image_mean).view(1, 3, 1, 1)
        std = torch.tensor(self.image_std).view(1, 3, 1, 1)
        return BatchFeature({"pixel_values": (pixels - mean) / std}, tensor_type=return_tensors)

    def to_square(self, image: Image.Image) -> Image.Image:
        """The geometric part: an RGB square of side `image_size`, before normalisation."""
        size = self.image_size
        if self.resize_mode == "pad" and image.width != image.height:
            side = max(image.size)
            # LLaVA's background: the channel means, truncated.
            canvas = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in self.image_mean))
            canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = canvas
        elif self.resize_mode == "crop":
            scale = size / min(image.size)
            width, height = max(size, round(image.width * scale)), max(size, round(image.height * scale))
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            left, top = (width - size) // 2, (height - size) // 2
            return image.crop((left, top, left + size, top + size))
        return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)


def _as_pillow(image: Any) -> Image.Image:
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    if isinstance(image, Image.Image):
        return image if image.mode == "RGB" else image.convert("RGB")
    raise InputError(f"{type(image).__name__} is not an image", where="images", remedy="Give Pillow images or arrays.")


register("image_processor")
