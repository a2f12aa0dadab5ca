"""Large images as tiles (*anyres* of LLaVA-NeXT): which grid, which pixels, which features. Pure functions.

Shape letters: N images, T tiles of all images, P features per tile, D hidden size, G features per side of a tile.

An image is shown whole in one tile (the base) and again, larger, in a grid of tiles. The grid is the one of a list of
sizes (``pinpoints``) that shows most of the image and wastes least. What the language model gets of an image is the
base's features, then the grid's, row by row over all its tiles, without those of the padding and with a learnt
*newline* embedding at the end of every row. The reference is ``LlavaNextForConditionalGeneration`` of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.image_processing_utils import select_best_resolution

from symphony_vlm.errors import InputError
from symphony_vlm.model.vision import VisionConfig

__all__ = ["TileGrid", "llava_next_pinpoints", "new_image_newline", "pack_image_features", "tile_grid_of"]


def llava_next_pinpoints(tile_size: int) -> list[list[int]]:
    """Heights and widths that LLaVA-NeXT chooses from: 1 x 2, 2 x 1, 2 x 2, 3 x 1 and 1 x 3 tiles."""
    return [[rows * tile_size, columns * tile_size] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


@dataclass(frozen=True)
class TileGrid:
    """The sizes to choose from, and the side of a tile; image sizes are (height, width) in pixels.

    Raises:
        InputError: no size, or one that is not made of whole tiles.
    """

    pinpoints: tuple[tuple[int, int], ...]
    tile_size: int

    def __post_init__(self) -> None:
        wrong = [list(size) for size in self.pinpoints if len(size) != 2 or any(not self._is_whole(s) for s in size)]
        if wrong or not self.pinpoints:
            raise InputError(
                f"{wrong[0]} is not made of whole tiles of {self.tile_size}" if wrong else "no size is given",
                where="grid_pinpoints",
                remedy=f"Give multiples of the encoder's image size, as {llava_next_pinpoints(self.tile_size)}.",
            )

    def _is_whole(self, side: int) -> bool:
        return isinstance(side, int) and side > 0 and side % self.tile_size == 0

    @classmethod
    def of(cls, pinpoints: Sequence[Sequence[int]], tile_size: int) -> TileGrid:
        """From lists, as configurations hold them."""
        return cls(tuple(tuple(size) for size in pinpoints), tile_size)  # type: ignore[misc]

    def shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tiles for an image."""
        height, width = select_best_resolution(size, list(self.pinpoints))
        return height // self.tile_size, width // self.tile_size

    def num_tiles(self, size: tuple[int, int]) -> int:
        """Tiles of an image, the base included."""
        rows, columns = self.shape(size)
        return 1 + rows * columns

    def num_tokens(self, size: tuple[int, int], features_per_tile: int) -> int:
        """Features of an image, newlines included."""
        rows, columns = self.unpadded(size, math.isqrt(features_per_tile))
        height, width = rows[1] - rows[0], columns[1] - columns[0]
        return features_per_tile + height * (width + 1)

    def unpadded(self, size: tuple[int, int], side_G: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """First and behind-last row and column of the grid's features that show the image and not its padding.

        Of an image that is so long that it would not fill half a feature, no row (or column) is left.
        """
        grid_height, grid_width = (side_G * number for number in self.shape(size))
        height, width = size
        if width / height > grid_width / grid_height:
            # Rounded as in transformers: the product may lie a hair below a whole number.
            margin = (grid_height - int(round(height * (grid_width / width), 7))) // 2
            return (margin, grid_height - margin), (0, grid_width)
        margin = (grid_width - int(round(width * (grid_height / height), 7))) // 2
        return (0, grid_height), (margin, grid_width - margin)

    def tiles(self, image: Image.Image, resample: Image.Resampling) -> np.ndarray:
        """The base and the tiles of an RGB image, row by row, uint8 ``[tiles, tile_size, tile_size, 3]``."""
        side = self.tile_size
        rows, columns = self.shape((image.height, image.width))
        canvas = Image.new("RGB", (columns * side, rows * side))
        scale = min(canvas.width / image.width, canvas.height / image.height)
        fits_width = canvas.width / image.width < canvas.height / image.height
        width = canvas.width if fits_width else min(math.ceil(image.width * scale), canvas.width)
        height = min(math.ceil(image.height * scale), canvas.height) if fits_width else canvas.height
        resized = image.resize((width, height), resample)
        canvas.paste(resized, ((canvas.width - width) // 2, (canvas.height - height) // 2))
        grid = np.asarray(canvas).reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        return np.concatenate([np.asarray(image.resize((side, side), resample))[None], grid])


def tile_grid_of(pinpoints: Sequence[Sequence[int]] | None, vision: VisionConfig) -> TileGrid | None:
    """The grid of a model with this vision tower; None: images are not cut.

    Raises:
        InputError: the sizes do not fit the tower, or its features do not form one map.
    """
    if pinpoints is None:
        return None
    for setting, good in (("feature_select", "patch"), ("scales", (1,))):
        if (value := getattr(vision, setting)) != good:
            raise InputError(
                f"{value!r} and tiles (anyres) do not go together",
                where=f"vision.{setting}",
                remedy=f"Use {good!r}, or another resize_mode than anyres.",
            )
    return TileGrid.of(pinpoints, vision.image_size)


def new_image_newline(hidden_size: int) -> nn.Parameter:
    """The embedding that ends a row of the grid, of about the length of the projected features, ``[D]``."""
    return nn.Parameter(torch.randn(hidden_size) / math.sqrt(hidden_size))


def pack_image_features(
    features_TPD: Tensor, image_sizes: Sequence[tuple[int, int]], grid: TileGrid, newline_D: Tensor
) -> list[Tensor]:
    """Features of each image in the order in which the language model reads them, ``[n_i, D]``.

    Args:
        features_TPD: projected features of all tiles of all images.
        image_sizes: height and width of each image.
        grid: the grid's settings.
        newline_D: stands at the end of every row of the grid.

    Raises:
        ValueError: the tiles are not those of images of these sizes.
    """
    counts = [grid.num_tiles(size) for size in image_sizes]
    if sum(counts) != len(features_TPD):
        raise ValueError(
            f"{len(features_TPD)} tiles, but images of the sizes {[list(size) for size in image_sizes]} have {counts}; "
            "pixel_values and image_sizes must come from one call of the processor"
        )
    side_G = math.isqrt(features_TPD.shape[1])
    packed = []
    for size, tiles_tPD in zip(image_sizes, features_TPD.split(counts), strict=True):
        base_PD, rest = tiles_tPD[0], tiles_tPD[1:]
        rows, columns = grid.shape(size)
        # [rows, columns, G, G, D] -> [rows * G, columns * G, D]
        map_HWD = rest.unflatten(0, (rows, columns)).unflatten(2, (side_G, side_G)).transpose(1, 2)
        map_HWD = map_HWD.flatten(2, 3).flatten(0, 1)
        (top, bottom), (left, right) = grid.unpadded(size, side_G)
        map_HWD = map_HWD[top:bottom, left:right]
        newlines_H1D = newline_D.to(map_HWD.dtype).expand(len(map_HWD), 1, -1)
        packed.append(torch.cat([base_PD, torch.cat([map_HWD, newlines_H1D], dim=1).flatten(0, 1)]))
    return packed
