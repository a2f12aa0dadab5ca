"""Tiles, their number and the order of their features: those of LLaVA-NeXT in transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, Qwen3Config
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from symphony_vlm.errors import InputError
from symphony_vlm.model.anyres import TileGrid, llava_next_pinpoints, pack_image_features, tile_grid_of
from symphony_vlm.model.configuration import SymphonyVLMConfig
from symphony_vlm.model.image_processor import SymphonyImageProcessor
from symphony_vlm.model.vision import VisionConfig
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

TILE, PATCH, HIDDEN = 32, 8, 16
SIDE = TILE // PATCH
WIDE = [*llava_next_pinpoints(TILE), [TILE, TILE], [TILE, 6 * TILE], [6 * TILE, TILE]]
PINPOINTS = {"llava-next": llava_next_pinpoints(TILE), "wide": WIDE}
SIZES = [
    *[(32, 32), (64, 64), (65, 64), (64, 65), (10, 100), (100, 10), (33, 77), (480, 640), (640, 480), (1, 1)],
    *[(1, 500), (500, 1), (1, 20_000), (37, 41), (96, 32), (95, 32), (32, 97), (333, 999)],
]
"""Height and width."""


@pytest.fixture(scope="module")
def reference() -> LlavaNextForConditionalGeneration:
    """A random LLaVA-NeXT around a tiny CLIP."""
    vision = CLIPVisionConfig(
        image_size=TILE,
        patch_size=PATCH,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    text = Qwen3Config(
        vocab_size=40,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_grid_pinpoints=llava_next_pinpoints(TILE),
        vision_feature_layer=-1,
        image_token_index=39,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlavaNextForConditionalGeneration(config).eval()


def our_model(reference: Any) -> SymphonyVLMForConditionalGeneration:
    """A model of ours with the weights of the reference."""
    vision = VisionConfig(
        backend="transformers",
        architecture=reference.config.vision_config.to_dict(),
        image_size=TILE,
        feature_layer=-1,
    )
    config = SymphonyVLMConfig(
        vision_config=vision.to_dict(),
        text_config=reference.config.text_config,
        image_token_id=39,
        num_image_tokens=SIDE**2,
        grid_pinpoints=reference.config.image_grid_pinpoints,
    )
    model = SymphonyVLMForConditionalGeneration(config).eval()
    source = reference.model
    tower = source.vision_tower.state_dict()
    model.vision_tower.load_state_dict(
        {name: tower[name.removeprefix("model.")] for name in model.vision_tower.state_dict()}
    )
    model.projector[0].load_state_dict(source.multi_modal_projector.linear_1.state_dict())
    model.projector[2].load_state_dict(source.multi_modal_projector.linear_2.state_dict())
    model.language_model.model.load_state_dict(source.language_model.state_dict())
    model.language_model.lm_head.load_state_dict(reference.lm_head.state_dict())
    assert model.image_newline is not None
    with torch.no_grad():
        model.image_newline.copy_(source.image_newline)
    return model


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(size[0]).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.mark.parametrize("pinpoints", PINPOINTS.values(), ids=PINPOINTS)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_tiles_are_those_of_llava_next(pinpoints: list[list[int]], interpolation: str) -> None:
    resample = Image.Resampling[interpolation.upper()]
    theirs = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=pinpoints,
        resample=resample,
        do_pad=False,
    )
    ours = SymphonyImageProcessor(TILE, resize_mode="anyres", grid_pinpoints=pinpoints, interpolation=interpolation)
    grid = TileGrid.of(pinpoints, TILE)
    for size in SIZES:
        expected = theirs(noise(size), return_tensors="np")
        found = ours(noise(size))
        assert torch.equal(found["pixel_values"], torch.from_numpy(expected["pixel_values"][0])), size
        assert found["image_sizes"].tolist() == [list(size)] == np.asarray(expected["image_sizes"]).tolist()
        assert len(found["pixel_values"]) == grid.num_tiles(size)


def test_tiles_of_several_images_stand_one_after_the_other() -> None:
    processor = SymphonyImageProcessor(TILE, resize_mode="anyres")
    images = [noise(size) for size in SIZES[:8]]
    together = processor(images)
    alone = torch.cat([processor(image)["pixel_values"] for image in images])
    assert torch.equal(together["pixel_values"], alone)
    assert together["image_sizes"].tolist() == [list(size) for size in SIZES[:8]]


class _Counter(LlavaNextProcessor):
    """Only what counts; the processor itself wants a tokenizer."""

    def __init__(self, pinpoints: list[list[int]], patch: int, tile: int) -> None:
        self.image_processor = LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints, size={"shortest_edge": tile})
        self.patch_size, self.num_additional_image_tokens, self.tile = patch, 1, tile

    def count(self, size: tuple[int, int]) -> int:
        # One more for the class token, which the default strategy takes off again.
        return int(self._get_number_of_features(*size, self.tile, self.tile)) - 1


@settings(max_examples=300, deadline=None)
@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    geometry=st.sampled_from([(32, 8), (336, 14), (384, 16)]),
)
def test_token_counts_are_those_of_llava_next(height: int, width: int, geometry: tuple[int, int]) -> None:
    tile, patch = geometry
    pinpoints = llava_next_pinpoints(tile)
    grid = TileGrid.of(pinpoints, tile)
    assert grid.num_tokens((height, width), (tile // patch) ** 2) == _Counter(pinpoints, patch, tile).count(
        (height, width)
    )


@pytest.mark.parametrize("pinpoints", PINPOINTS.values(), ids=PINPOINTS)
def test_packed_features_are_those_of_llava_next(reference: Any, pinpoints: list[list[int]]) -> None:
    grid = TileGrid.of(pinpoints, TILE)
    generator = torch.Generator().manual_seed(0)
    newline = torch.randn(HIDDEN, generator=generator)
    tiles = [torch.randn(grid.num_tiles(size), SIDE**2, HIDDEN, generator=generator) for size in SIZES]
    reference.config.image_grid_pinpoints, before = pinpoints, reference.config.image_grid_pinpoints
    try:
        expected, lengths = reference.model.pack_image_features(tiles, torch.tensor(SIZES), "default", newline)
    finally:
        reference.config.image_grid_pinpoints = before
    packed = pack_image_features(torch.cat(tiles), SIZES, grid, newline)
    assert len(packed) == len(expected)
    for size, ours, theirs in zip(SIZES, packed, expected, strict=True):
        assert torch.equal(ours, theirs), size
        assert len(ours) == grid.num_tokens(size, SIDE**2)
    assert [len(part) for part in packed] == lengths.tolist()


@torch.no_grad()
def test_a_model_with_its_weights_has_the_features_and_logits_of_llava_next(reference: Any) -> None:
    model = our_model(reference)
    processor = SymphonyImageProcessor(TILE, resize_mode="anyres")
    sizes = [(33, 77), (480, 640), (100, 10)]
    inputs = processor([noise(size) for size in sizes])
    ours = model.get_image_features(**inputs)
    theirs = reference.get_image_features(**inputs).pooler_output
    for mine, other in zip(ours, theirs, strict=True):
        # The same arithmetic in the same order: both run the tower of transformers over the same batch.
        assert torch.equal(mine, other)
    picture = [39] * sum(len(part) for part in ours)
    ids = torch.tensor([[1, 2, *picture, 3, 4]])
    torch.testing.assert_close(
        model(input_ids=ids, **inputs).logits, reference(input_ids=ids, **inputs).logits, atol=1e-5, rtol=1e-5
    )


def test_pixels_and_sizes_that_do_not_belong_together_are_refused() -> None:
    grid = TileGrid.of(llava_next_pinpoints(TILE), TILE)
    with pytest.raises(ValueError, match=r"4 tiles, but images of the sizes \[\[32, 32\]\] have \[3\]"):
        pack_image_features(torch.zeros(4, 16, HIDDEN), [(32, 32)], grid, torch.zeros(HIDDEN))


@pytest.mark.parametrize(
    ("pinpoints", "message"),
    [
        ([], "no size is given"),
        ([[32, 40]], r"\[32, 40\] is not made of whole tiles of 32"),
        ([[0, 32]], "not made of whole tiles"),
        ([[32]], "not made of whole tiles"),
        ([[64.0, 32]], "not made of whole tiles"),
    ],
)
def test_a_grid_that_is_none_is_refused(pinpoints: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SymphonyImageProcessor(TILE, resize_mode="anyres", grid_pinpoints=pinpoints)


@pytest.mark.parametrize("setting", [{"feature_select": "cls_patch"}, {"scales": (1, 2)}])
def test_what_does_not_go_with_tiles_is_refused(setting: dict[str, Any]) -> None:
    vision = VisionConfig(backend="open_clip", architecture={}, image_size=TILE, **setting)
    with pytest.raises(InputError, match=next(iter(setting))):
        tile_grid_of(llava_next_pinpoints(TILE), vision)
    assert tile_grid_of(None, vision) is None
