"""Prepares images for a vision tower with Pillow.

First geometry, on 8-bit pixels (`SymphonyImageProcessor.prepare`), then arithmetic (`normalize`): data sets keep the
result of the first, which is a quarter of the size. ``docs/images.md`` says what each mode equals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from symphony_vlm.data.images import MAX_PIXELS
from symphony_vlm.errors import InputError
from symphony_vlm.model.anyres import TileGrid, llava_next_pinpoints
from symphony_vlm.model.encoder_preprocessing import crops, encoder_geometry
from symphony_vlm.model.registration import register
from symphony_vlm.text import nearest

__all__ = ["ResizeMode", "SymphonyImageProcessor"]

ResizeMode = Literal["pad", "crop", "stretch", "encoder", "anyres"]
STRIP_ROWS = 1024
"""Rows of a padded image that are in memory together."""


class SymphonyImageProcessor(BaseImageProcessor):
    """RGB images to normalised squares, ``[N, 3, size, size]``, or to tiles of that size.

    Args:
        image_size: side of the square (of a tile), in pixels.
        image_mean: per channel, of values in [0, 1].
        image_std: per channel.
        resize_mode: ``pad`` (LLaVA-1.5: centred on a square of the mean colour, then resized), ``crop`` (short side
            resized, centre cropped: CLIP), ``stretch`` (aspect ratio not kept), ``encoder`` (as `preprocessing`
            says) or ``anyres`` (LLaVA-NeXT: the stretched image and a grid of tiles).
        interpolation: Pillow's name of the filter.
        rescale_factor: makes the 8-bit values those that the mean and deviation are of.
        grid_pinpoints: for ``anyres``, the heights and widths to choose from; default: LLaVA-NeXT's.
        preprocessing: for ``encoder``, see `encoder_preprocessing.encoder_geometry`.

    Raises:
        InputError: a setting is unknown, or missing for its mode.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values", "image_sizes"]

    def __init__(
        self,
        image_size: int = 336,
        image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
        resize_mode: ResizeMode = "pad",
        interpolation: str = "bicubic",
        rescale_factor: float = 1 / 255,
        grid_pinpoints: Sequence[Sequence[int]] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if resize_mode not in get_args(ResizeMode):
            raise InputError(f"{resize_mode!r} is not one of {', '.join(get_args(ResizeMode))}", where="resize_mode")
        filters = [name.lower() for name in Image.Resampling.__members__]
        if interpolation not in filters:
            raise InputError(f"{interpolation!r} is no filter{nearest(interpolation, filters)}", where="interpolation")
        if resize_mode == "encoder" and preprocessing is None:
            raise InputError(
                "mode 'encoder' runs the encoder's own preprocessing, which is not given",
                where="preprocessing",
                remedy="Take it from a pretrained encoder, or use resize_mode: pad, crop or stretch.",
            )
        self.image_size = image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.resize_mode = resize_mode
        self.interpolation = interpolation
        self.rescale_factor = rescale_factor
        self.preprocessing = None if preprocessing is None else dict(preprocessing)
        if resize_mode == "anyres" and grid_pinpoints is None:
            grid_pinpoints = llava_next_pinpoints(image_size)
        self.grid_pinpoints = None if grid_pinpoints is None else [list(size) for size in grid_pinpoints]
        if self.tile_grid is None:
            self.grid_pinpoints = None

    @property
    def tile_grid(self) -> TileGrid | None:
        """The grid's settings if images become tiles."""
        if self.resize_mode != "anyres" or self.grid_pinpoints is None:
            return None
        return TileGrid.of(self.grid_pinpoints, self.image_size)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Images (one or a list; Pillow or uint8 ``[H, W, 3]`` arrays) to what the model takes.

        Returns:
            ``pixel_values``, fp32 ``[N, 3, H, W]``, and with ``anyres``, where they are the tiles of all images,
            ``image_sizes``, ``[N, 2]``: height and width of each image.
        """
        if isinstance(images, (Image.Image, np.ndarray)):
            images = [images]
        pillow = [_as_pillow(image) for image in images]
        values = {"pixel_values": self.normalize([self.prepare(image) for image in pillow])}
        if self.tile_grid is not None:
            values["image_sizes"] = torch.tensor([(image.height, image.width) for image in pillow])
        return BatchFeature(values, tensor_type=return_tensors)

    def prepare(self, image: Image.Image) -> np.ndarray:
        """The geometric part, uint8 ``[size, size, 3]``, or the tiles of the image, ``[tiles, size, size, 3]``."""
        if self.tile_grid is not None:
            return self.tile_grid.tiles(image, self._filter)
        return np.asarray(self.to_square(image))

    def normalize(self, prepared: Sequence[np.ndarray]) -> Tensor:
        """Results of `prepare`, all tiles one after the other, to fp32 ``[N, 3, size, size]``."""
        squares = np.concatenate([item.reshape(-1, *item.shape[-3:]) for item in prepared])
        mean = torch.tensor(self.image_mean).view(3, 1, 1)
        std = torch.tensor(self.image_std).view(3, 1, 1)
        result = torch.empty(len(squares), 3, *squares.shape[1:3])
        for square, pixels in zip(squares, result, strict=True):
            # The product in fp64, as transformers has it. With 1/255 that is the quotient in fp32, as open_clip has it.
            values = torch.from_numpy(square).permute(2, 0, 1).double() * self.rescale_factor
            pixels.copy_((values.float() - mean) / std)
        return result

    def to_square(self, image: Image.Image) -> Image.Image:
        """The geometric part for one square: RGB of side `image_size`, before normalisation."""
        if self.resize_mode == "encoder":
            return self._as_the_encoder_does(image)
        if self.resize_mode == "pad" and image.width != image.height:
            return self._padded(image)
        if self.resize_mode == "crop":
            return self._cropped(image)
        return image.resize((self.image_size, self.image_size), self._filter)

    @property
    def _filter(self) -> Image.Resampling:
        return Image.Resampling[self.interpolation.upper()]

    def _as_the_encoder_does(self, image: Image.Image) -> Image.Image:
        assert self.preprocessing is not None
        if crops(self.preprocessing):
            image = _without_far_ends(image, self.image_size)
        geometry = encoder_geometry(self.preprocessing)
        try:
            pixels = geometry(image)
        except ValueError as error:
            raise InputError(
                f"the encoder's own preprocessing cannot prepare an image of {image.width} x {image.height}: {error}",
                where="resize_mode",
                remedy="Use resize_mode: pad, crop or stretch, or leave the image out.",
            ) from error
        if pixels.shape != (self.image_size, self.image_size, 3) or pixels.dtype != np.uint8:
            raise InputError(
                f"the encoder's own preprocessing gives {pixels.dtype} {pixels.shape}, not squares of "
                f"{self.image_size} with 8 bits",
                where="resize_mode",
                remedy="Use resize_mode: pad, crop or stretch.",
            )
        return Image.fromarray(pixels)

    def _padded(self, image: Image.Image) -> Image.Image:
        """Resized from a square with the image in its middle and LLaVA's background, the channel means, truncated.

        The square is never made whole: of a long strip it would be gigabytes. Pillow resizes rows first and columns
        then, rounding in between, so doing the rows piece by piece changes nothing.
        """
        size, side = self.image_size, max(image.size)
        colour = tuple(int(255 * mean) for mean in self.image_mean)
        left, top = (side - image.width) // 2, (side - image.height) // 2
        narrowed = Image.new("RGB", (size, side), colour)
        for start in range(0, image.height, STRIP_ROWS):
            strip = image.crop((0, start, image.width, min(start + STRIP_ROWS, image.height)))
            rows = Image.new("RGB", (side, strip.height), colour)
            rows.paste(strip, (left, 0))
            narrowed.paste(rows.resize((size, rows.height), self._filter), (0, top + start))
        return narrowed.resize((size, size), self._filter)

    def _cropped(self, image: Image.Image) -> Image.Image:
        size, image = self.image_size, _without_far_ends(image, self.image_size)
        # Rounded down, and the middle too, as CLIPImageProcessor does.
        long = int(size * max(image.size) / min(image.size))
        resized = image.resize((long, size) if image.width >= image.height else (size, long), self._filter)
        left, top = (resized.width - size) // 2, (resized.height - size) // 2
        return resized.crop((left, top, left + size, top + size))


def _without_far_ends(image: Image.Image, size: int) -> Image.Image:
    """An image that, its short side resized to `size`, has no more pixels than an image may have.

    Of a longer one the middle is taken, from which a crop takes far less.
    """
    longest = MAX_PIXELS // size * min(image.size) // size
    if max(image.size) <= longest:
        return image
    width, height = min(image.width, longest), min(image.height, longest)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _as_pillow(image: Any) -> Image.Image:
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    if isinstance(image, Image.Image):
        return image if image.mode == "RGB" else image.convert("RGB")
    raise InputError(f"{type(image).__name__} is not an image", where="images", remedy="Give Pillow images or arrays.")


register("image_processor")
