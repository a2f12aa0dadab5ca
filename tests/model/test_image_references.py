"""Prepared images are those of the libraries, bit for bit: transformers on Pillow, open_clip, LLaVA's padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from symphony_vlm.data.images import MAX_PIXELS
from symphony_vlm.errors import InputError
from symphony_vlm.model.encoder_preprocessing import open_clip_preprocessing, transformers_preprocessing
from symphony_vlm.model.image_processor import STRIP_ROWS, SymphonyImageProcessor

SIZES = [
    *[(224, 224), (336, 336), (640, 480), (480, 640), (37, 53), (53, 37), (1, 1), (2, 3), (500, 375), (333, 500)],
    *[(1, 500), (500, 1), (3, 700), (1200, 7), (225, 224), (226, 224), (227, 224), (224, 229), (1023, 19)],
]
"""Width and height."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def ours(image: Image.Image, **settings: Any) -> torch.Tensor:
    values: torch.Tensor = SymphonyImageProcessor(**settings)(image)["pixel_values"][0]
    return values


def expand2square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The canvas of LLaVA's ``mm_utils.expand2square``."""
    side = max(image.size)
    canvas = Image.new(image.mode, (side, side), colour)
    corner = (0, (side - image.height) // 2) if image.width > image.height else ((side - image.width) // 2, 0)
    canvas.paste(image, corner)
    return canvas


@pytest.mark.parametrize("size", [64, 224, 336])
def test_pad_is_llavas(size: int) -> None:
    reference = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=MEAN, image_std=STD
    )
    for width, height in [*SIZES, (40, 3 * STRIP_ROWS + 1)]:
        image = noise(width, height)
        square = expand2square(image, tuple(int(value * 255) for value in MEAN))
        expected = reference(square, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(ours(image, image_size=size), expected), (width, height)


@pytest.mark.parametrize(("size", "interpolation"), [(64, "bicubic"), (65, "bilinear"), (224, "bicubic")])
def test_crop_is_that_of_clip_in_transformers(size: int, interpolation: str) -> None:
    reference = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        resample=Image.Resampling[interpolation.upper()],
    )
    for width, height in SIZES:
        image = noise(width, height)
        expected = reference(image, return_tensors="pt")["pixel_values"][0]
        found = ours(image, image_size=size, resize_mode="crop", interpolation=interpolation)
        assert torch.equal(found, expected), (width, height)


@pytest.mark.parametrize("size", [64, 65])
def test_crop_is_that_of_open_clip_but_for_a_middle_between_two_pixels(size: int) -> None:
    """The margin (long - size) / 2 may end in a half: transformers rounds it down, open_clip to the even neighbour."""
    reference = image_transform(size, is_train=False)
    shifted = 0
    for width, height in [*SIZES, *((size + extra, size) for extra in range(9))]:
        image = noise(width, height)
        expected = reference(image)
        long = int(size * max(width, height) / min(width, height))
        if (long - size) % 4 == 3:
            shifted += 1
            axis = 1 if width > height else 0
            box = [0, 0, size, size]
            box[1 - axis], box[3 - axis] = (long - size) // 2 + 1, (long - size) // 2 + 1 + size
            resized = image.resize((long, size) if width > height else (size, long), Image.Resampling.BICUBIC)
            image = resized.crop((box[0], box[1], box[2], box[3]))
        assert torch.equal(ours(image, image_size=size, resize_mode="crop"), expected), (width, height)
    assert shifted >= 2


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_stretch_is_squash_of_open_clip_and_the_processor_of_siglip(interpolation: str) -> None:
    squash = image_transform(64, is_train=False, resize_mode="squash", interpolation=interpolation)
    siglip = SiglipImageProcessorPil(size={"height": 64, "width": 64}, resample=Image.Resampling[interpolation.upper()])
    half = (0.5, 0.5, 0.5)
    for width, height in SIZES:
        image = noise(width, height)
        found = ours(image, image_size=64, resize_mode="stretch", interpolation=interpolation)
        assert torch.equal(found, squash(image)), (width, height)
        found = ours(
            image, image_size=64, resize_mode="stretch", interpolation=interpolation, image_mean=half, image_std=half
        )
        assert torch.equal(found, siglip(image, return_tensors="pt")["pixel_values"][0]), (width, height)


def test_every_grey_level_is_normalised_as_both_libraries_do() -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    found = ours(Image.fromarray(levels), image_size=16)
    assert torch.equal(found, image_transform(16, is_train=False)(Image.fromarray(levels)))


@pytest.mark.parametrize(
    "cfg", [{}, {"resize_mode": "squash", "interpolation": "bilinear"}, {"resize_mode": "longest"}]
)
def test_mode_encoder_runs_open_clips_transform(cfg: dict[str, Any], tmp_path: Path) -> None:
    preprocess_cfg = {"size": (48, 48), "mode": "RGB", "mean": MEAN, "std": STD, "fill_color": 7, **cfg}
    processor = SymphonyImageProcessor(
        48, MEAN, STD, resize_mode="encoder", preprocessing=open_clip_preprocessing(preprocess_cfg)
    )
    processor.save_pretrained(tmp_path)
    again = SymphonyImageProcessor.from_pretrained(tmp_path)
    reference = image_transform(48, is_train=False, mean=MEAN, std=STD, fill_color=7, **cfg)
    for width, height in SIZES:
        image = noise(width, height)
        try:
            expected = reference(image)
        except ValueError:  # open_clip's longest makes a long strip nothing high
            with pytest.raises(InputError, match=f"cannot prepare an image of {width} x {height}"):
                processor(image)
            continue
        for candidate in (processor, again):
            assert torch.equal(candidate(image)["pixel_values"][0], expected), (width, height)


@pytest.mark.parametrize(
    "source",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 50}, crop_size={"height": 48, "width": 48}),
        SiglipImageProcessorPil(size={"height": 48, "width": 48}, resample=Image.Resampling.BILINEAR),
    ],
    ids=["clip", "siglip"],
)
def test_mode_encoder_runs_the_processor_of_transformers(source: Any, tmp_path: Path) -> None:
    source.save_pretrained(tmp_path / "encoder")
    original = AutoImageProcessor.from_pretrained(tmp_path / "encoder", backend="pil")
    processor = SymphonyImageProcessor(
        48,
        original.image_mean,
        original.image_std,
        resize_mode="encoder",
        preprocessing=transformers_preprocessing(original),
    )
    processor.save_pretrained(tmp_path / "ours")
    again = SymphonyImageProcessor.from_pretrained(tmp_path / "ours")
    for width, height in SIZES:
        image = noise(width, height)
        expected = original(image, return_tensors="pt")["pixel_values"][0]
        for candidate in (processor, again):
            assert torch.equal(candidate(image)["pixel_values"][0], expected), (width, height)


def test_mode_encoder_refuses_what_gives_no_square_and_what_is_unknown() -> None:
    wide = transformers_preprocessing(SiglipImageProcessorPil(size={"height": 8, "width": 16}))
    with pytest.raises(InputError, match=r"gives uint8 \(8, 16, 3\), not squares of 16"):
        SymphonyImageProcessor(16, resize_mode="encoder", preprocessing=wide)(noise(20, 20))
    with pytest.raises(InputError, match="transformers has no 'NoSuchProcessor' that works with Pillow"):
        SymphonyImageProcessor(
            16,
            resize_mode="encoder",
            preprocessing={"library": "transformers", "image_processor_type": "NoSuchProcessor"},
        )(noise(20, 20))
    with pytest.raises(InputError, match="'jax' is not one of open_clip, transformers"):
        SymphonyImageProcessor(16, resize_mode="encoder", preprocessing={"library": "jax"})(noise(20, 20))
    with pytest.raises(InputError, match="the encoder's own preprocessing, which is not given"):
        SymphonyImageProcessor(16, resize_mode="encoder")


@pytest.mark.parametrize(
    ("mode", "shape"),
    [
        ("pad", (1, 20_000)),
        ("crop", (20_000, 1)),
        ("crop", (2, 40_000)),
        ("stretch", (20_000, 1)),
        ("encoder", (20_000, 1)),
        ("anyres", (1, 20_000)),
    ],
)
def test_an_absurd_shape_is_prepared_without_gigabytes(
    mode: Any, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = 0
    new, resize = Image.new, Image.Image.resize

    def watched_new(mode: str, size: tuple[int, int], *args: Any) -> Image.Image:
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return new(mode, size, *args)

    def watched_resize(self: Image.Image, size: tuple[int, int], *args: Any, **kwargs: Any) -> Image.Image:
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image, "new", watched_new)
    monkeypatch.setattr(Image.Image, "resize", watched_resize)
    preprocessing = open_clip_preprocessing({"size": 336}) if mode == "encoder" else None
    processor = SymphonyImageProcessor(336, resize_mode=mode, preprocessing=preprocessing)
    pixels = processor(noise(*shape))["pixel_values"]
    assert pixels.shape[1:] == (3, 336, 336) and torch.isfinite(pixels).all()
    assert 0 < largest <= MAX_PIXELS
