"""Features at several scales against the definition, worked out image by image and tile by tile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import symphony_vlm as sv
from symphony_vlm.errors import InputError
from symphony_vlm.model.vision import VisionConfig, VisionTower, build_vision_tower, load_vision_tower
from symphony_vlm.moe.configuration import MoEConfig

SIZE = 24
VIT = {"image_size": SIZE, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}
HUGGING_FACE = {"image_size": SIZE, "patch_size": 8, "hidden_size": 16, "intermediate_size": 24} | {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TOWERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "open_clip": ("open_clip", {"embed_dim": 12, "vision_cfg": VIT}),
    "clip": ("transformers", {"model_type": "clip_vision_model", **HUGGING_FACE}),
    "siglip": ("transformers", {"model_type": "siglip_vision_model", **HUGGING_FACE}),
}


def tower_of(kind: str, **settings: Any) -> VisionTower:
    backend, architecture = TOWERS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = VisionConfig(
            backend=backend, architecture=architecture, image_size=SIZE, **({"feature_layer": -1} | settings)
        )
        return build_vision_tower(config).eval()


def pixels(number: int, size: int) -> Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(0))


def oracle(tower: VisionTower, images: Tensor, scales: tuple[int, ...], num_prefix: int) -> Tensor:
    """``multiscale_forward`` of bfshi/scaling_on_scales (s2wrapper) in loops."""
    rows = []
    for image in images:
        channels, prefixes = [], []
        for scale in scales:
            resized = F.interpolate(image[None], size=scale * SIZE, mode="bicubic")
            strips, heads = [], []
            for top in range(0, scale * SIZE, SIZE):
                tiles = []
                for left in range(0, scale * SIZE, SIZE):
                    features = tower.encode(resized[:, :, top : top + SIZE, left : left + SIZE])[0]
                    heads.append(features[:num_prefix])
                    side = round((len(features) - num_prefix) ** 0.5)
                    tiles.append(features[num_prefix:].reshape(side, side, -1))
                strips.append(torch.cat(tiles, dim=1))
            whole = torch.cat(strips, dim=0)
            side = whole.shape[0] // scale
            pooled = [
                whole[scale * y : scale * (y + 1), scale * x : scale * (x + 1)].mean((0, 1))
                for y in range(side)
                for x in range(side)
            ]
            channels.append(torch.stack(pooled))
            prefixes.append(torch.stack(heads).mean(0))
        rows.append(torch.cat([torch.cat(prefixes, dim=-1), torch.cat(channels, dim=-1)]))
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("scales", [(1, 3), (1, 2), (1, 2, 3)])
@pytest.mark.parametrize("select", ["patch", "cls_patch"])
@pytest.mark.parametrize("kind", TOWERS)
def test_features_are_those_of_the_definition(kind: str, select: Any, scales: tuple[int, ...]) -> None:
    tower = tower_of(kind, feature_select=select, scales=scales)
    images = pixels(2, SIZE * scales[-1])
    num_prefix = int(select == "cls_patch" and kind != "siglip")
    # Features of about 1; batches of other sizes and means in another order round otherwise.
    expected = oracle(tower, images, scales, num_prefix)
    torch.testing.assert_close(tower(images), expected, atol=1e-5, rtol=1e-5)
    assert (tower.num_tokens, tower.hidden_size) == expected.shape[1:] == (9 + num_prefix, 16 * len(scales))
    assert tower.config.input_size == images.shape[-1]


@torch.no_grad()
def test_one_scale_is_the_tower_itself_and_the_first_channels_are_the_whole_image() -> None:
    single, double = tower_of("clip"), tower_of("clip", scales=(1, 2))
    assert torch.equal(single(pixels(2, SIZE)), single.encode(pixels(2, SIZE)))
    large = pixels(2, 2 * SIZE)
    small = F.interpolate(large, size=SIZE, mode="bicubic")
    torch.testing.assert_close(double(large)[..., :16], single(small), atol=1e-5, rtol=1e-5)
    assert [name for name, _ in single.named_parameters()] == [name for name, _ in double.named_parameters()]


def test_every_parameter_gets_a_gradient() -> None:
    tower = tower_of("open_clip", scales=(1, 2)).train()
    tower(pixels(2, 2 * SIZE)).square().sum().backward()
    assert [name for name, parameter in tower.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("scales", [(), (2,), (1, 1), (3, 1), (1, 1.5), (0, 1)])
def test_scales_that_do_not_ascend_from_one_are_refused(scales: Any) -> None:
    with pytest.raises(InputError, match="no ascending list of whole numbers from 1"):
        tower_of("clip", scales=scales)


def test_a_pretrained_tower_is_loaded_with_scales(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    CLIPVisionModel(CLIPVisionConfig(**HUGGING_FACE)).save_pretrained(tmp_path)
    CLIPImageProcessor().save_pretrained(tmp_path)
    tower = load_vision_tower("transformers", str(tmp_path), scales=[1, 3])
    assert (tower.config.scales, tower.hidden_size, tower.config.input_size) == ((1, 3), 32, 3 * SIZE)


@torch.no_grad()
@pytest.mark.parametrize("moe", [None, MoEConfig(num_experts=4, modules=("language", "projector", "vision"))])
def test_a_model_with_scales_is_saved_probed_and_answers(
    tmp_path: Path, tiny_model_factory: Any, moe: MoEConfig | None
) -> None:
    """With experts in the tower one pass sees the squares of all scales, so the record has all of their tokens."""
    model = tiny_model_factory(scales=(1, 3), moe=moe)
    images = [Image.new("RGB", (50, 40), "red"), Image.new("RGB", (20, 90), "blue")]
    inputs = model.processor(images=images, text="<image><image>What?")
    assert inputs["pixel_values"].shape == (2, 3, 96, 96)
    logits = model(**inputs).logits
    assert torch.isfinite(logits).all() and torch.isfinite(model(**model.probe_inputs()).logits).all()
    assert model._idle_vision_pass() == 0
    if moe is not None:
        model(**inputs)
        # Two images, ten squares each, sixteen patches and a class token in each square.
        assert len(model.routing.outputs["vision.0"].indices_TK) == 2 * 10 * 17
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    again = sv.load(tmp_path, device="cpu")
    assert torch.equal(again(**again.processor(images=images, text="<image><image>What?")).logits, logits)
    assert again.chat("What?", images[0], max_new_tokens=3) == model.chat("What?", images[0], max_new_tokens=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": (1, 3)}, r"vision\.scales: \[1, 3\] cannot be expressed"),
        ({"resize_mode": "anyres"}, r"vision\.resize_mode: 'anyres' cannot be expressed"),
    ],
)
def test_what_llava_cannot_do_is_not_exported(
    settings: dict[str, Any], message: str, tmp_path: Path, tiny_model_factory: Any
) -> None:
    model = tiny_model_factory(**settings)
    with pytest.raises(InputError, match=message):
        sv.export(model, tmp_path / "stock")
    assert not (tmp_path / "stock").exists()
