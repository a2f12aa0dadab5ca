"""Image preparation against values worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from symphony_vlm.errors import InputError
from symphony_vlm.model.image_processor import SymphonyImageProcessor

MEAN, STD = (0.5, 0.25, 0.1), (0.5, 0.25, 0.2)
BACKGROUND = [127, 63, 25]  # int(255 * mean), truncated as in LLaVA


def processor_of(size: int, mode: Any) -> SymphonyImageProcessor:
    return SymphonyImageProcessor(size, MEAN, STD, resize_mode=mode)


def columns(width: int, height: int) -> Image.Image:
    """Every column has its own brightness, 10 per column, so that one sees which columns are left."""
    row = (np.arange(width) * 10).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(row[None, :, None], (height, width, 3)).copy())


@pytest.mark.parametrize("mode", ["pad", "crop", "stretch"])
def test_an_image_of_the_right_size_is_only_normalised(mode: str) -> None:
    image = columns(8, 8)
    values = processor_of(8, mode)(image)["pixel_values"]
    assert values.shape == (1, 3, 8, 8) and values.dtype == torch.float32
    for channel in range(3):
        expected = (np.asarray(image)[..., channel] / 255 - MEAN[channel]) / STD[channel]
        np.testing.assert_allclose(values[0, channel].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(("width", "height", "left", "top"), [(8, 4, 0, 2), (4, 8, 2, 0), (8, 5, 0, 1)])
def test_pad_centres_the_image_on_the_mean_colour(width: int, height: int, left: int, top: int) -> None:
    square = np.asarray(processor_of(8, "pad").to_square(columns(width, height)))
    expected = np.broadcast_to(np.array(BACKGROUND, dtype=np.uint8), (8, 8, 3)).copy()
    expected[top : top + height, left : left + width] = np.asarray(columns(width, height))
    np.testing.assert_array_equal(square, expected)


def test_crop_keeps_the_middle_of_the_long_side() -> None:
    square = np.asarray(processor_of(4, "crop").to_square(columns(10, 4)))
    assert square[0, :, 0].tolist() == [30, 40, 50, 60]


def test_stretch_resizes_the_whole_image() -> None:
    image = columns(12, 4)
    square = np.asarray(processor_of(6, "stretch").to_square(image))
    np.testing.assert_array_equal(square, np.asarray(image.resize((6, 6), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("mode", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("shape", [(1, 100), (100, 1), (7, 13), (1, 1)])
def test_every_shape_becomes_a_square_of_the_given_side(mode: str, shape: tuple[int, int]) -> None:
    assert processor_of(6, mode).to_square(Image.new("RGB", shape)).size == (6, 6)


def test_several_images_keep_their_order_and_arrays_count_as_images() -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    values = processor_of(8, "pad")([red, np.asarray(blue)])["pixel_values"]
    assert torch.equal(values[0], processor_of(8, "pad")(red)["pixel_values"][0])
    assert torch.equal(values[1], processor_of(8, "pad")(blue)["pixel_values"][0])


def test_settings_survive_saving(tmp_path: Path) -> None:
    processor = processor_of(8, "crop")
    processor.save_pretrained(tmp_path)
    again = SymphonyImageProcessor.from_pretrained(tmp_path)
    image = columns(11, 9)
    assert torch.equal(processor(image)["pixel_values"], again(image)["pixel_values"])


def test_an_unknown_mode_and_something_else_than_an_image_are_refused() -> None:
    with pytest.raises(InputError, match="'fill' is not one of pad, crop, stretch"):
        processor_of(8, "fill")
    with pytest.raises(InputError, match="int is not an image"):
        processor_of(8, "pad")([3])
