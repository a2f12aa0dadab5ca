"""The image settings of a recipe, from the recipe to a trained, saved and opened model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoImageProcessor, SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import symphony_vlm as sv
from symphony_vlm.config.loading import load_recipe
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.errors import InputError
from symphony_vlm.training.run import train

SIZE = 32
NOT_SQUARE = [(40, 100), (64, 48), (32, 32)]
"""Width and height of the pictures."""


@pytest.fixture
def recipe_with(tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe of one short stage on three pictures of different shapes, one of two pictures and one of none."""
    records: list[dict[str, Any]] = []
    for number, size in enumerate(NOT_SQUARE):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / f"{number}.png")
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns("<image>\nWhat?")})
    records.append({"id": "two", "image": ["0.png", "1.png"], "conversations": turns("<image><image>\nWhat?")})
    records.append({"id": "none", "conversations": turns("What?")})
    (tmp_path / "train.json").write_text(json.dumps(records))

    def make(data: dict[str, Any] | None = None, **vision: Any) -> Recipe:
        values = load_recipe("tiny").model_dump(mode="json")
        (stage,) = [stage for stage in values["stages"] if stage["name"] == "pretrain"]
        rates = {"projector": 1e-2, "vision_tower": 1e-3}
        values["stages"] = [
            {**stage, "train": rates, "template": None, "data": "train", "max_steps": 2, "batch_size": 5}
        ]
        architecture = {
            "embed_dim": 16,
            "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8},
        }
        values["model"]["vision"] = {"architecture": architecture, "feature_layer": -1, **vision}
        if "name" in vision:
            del values["model"]["vision"]["architecture"]
        values["data"] = {
            "train": str(tmp_path / "train.json"),
            "scenes": None,
            "validation_fraction": 0.0,
            **(data or {}),
        }
        return Recipe.model_validate(values)

    return make


def turns(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "A small red star."}]


@pytest.mark.parametrize(
    "vision",
    [
        {"resize_mode": "anyres"},
        {"resize_mode": "anyres", "grid_pinpoints": [[SIZE, 4 * SIZE], [2 * SIZE, 2 * SIZE]]},
        {"scales": [1, 3]},
        {"scales": [1, 2], "resize_mode": "crop"},
    ],
)
def test_a_model_with_these_settings_trains_and_is_opened_again(
    vision: dict[str, Any], recipe_with: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    train(recipe_with(**vision), tmp_path / "run", console=quiet)
    model = sv.load(tmp_path / "run", device="cpu")
    assert model.processor is not None
    if "scales" in vision:
        assert model.vision_tower.config.scales == tuple(vision["scales"])
        assert model.vision_tower.hidden_size == 16 * len(vision["scales"])
        assert model.processor.image_processor.image_size == SIZE * vision["scales"][-1]
    else:
        weights = load_file(tmp_path / "run" / "pretrain" / "model" / "model.safetensors")
        assert "image_newline" in weights
        expected = vision.get("grid_pinpoints") or [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
        assert model.config.grid_pinpoints == model.processor.image_processor.grid_pinpoints == expected
    pictures = [tmp_path / f"{number}.png" for number in range(3)]
    out = model.processor(images=[*map(str, pictures)], text="<image><image><image>What?")
    with torch.no_grad():
        assert torch.isfinite(model(**out).logits).all()
    assert isinstance(model.chat("What?", [*pictures], max_new_tokens=3), str)


def test_an_image_above_max_pixels_stops_the_run_before_it_begins(
    recipe_with: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    recipe = recipe_with(data={"max_pixels": 3500})
    with pytest.raises(InputError, match=r"40 x 100 = 4,000 pixels; the limit is 3,500"):
        train(recipe, tmp_path / "run", console=quiet)
    skipping = recipe_with(data={"max_pixels": 3500, "on_bad_sample": "skip", "check_images": False})
    with pytest.raises(InputError, match="the limit is 3,500"):  # not checked before, so found when it is used
        train(skipping, tmp_path / "late", console=quiet)


def test_mode_encoder_is_the_preprocessing_of_a_pretrained_open_clip(
    recipe_with: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    import open_clip
    from safetensors.torch import save_file

    architecture = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1},
    }
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "resize_mode": "squash"}
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": architecture, "preprocess_cfg": preprocess}))
    clip = open_clip.CLIP(**architecture)
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, folder / "open_clip_model.safetensors")

    train(recipe_with(name=str(folder), resize_mode="encoder"), tmp_path / "run", console=quiet)
    model = sv.load(tmp_path / "run", device="cpu")
    assert model.processor is not None and model.vision_tower.config.interpolation == "bilinear"
    reference = image_transform(
        SIZE, is_train=False, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear", resize_mode="squash"
    )
    for number in range(3):
        image = Image.open(tmp_path / f"{number}.png")
        assert torch.equal(model.processor.image_processor(image)["pixel_values"][0], reference(image))
    with pytest.raises(InputError, match=r"vision\.resize_mode: 'encoder' cannot be expressed"):
        sv.export(model, tmp_path / "stock")


@pytest.mark.parametrize("mode", ["encoder", "stretch"])
def test_an_encoder_of_transformers_brings_its_filter_and_factor(
    mode: str, recipe_with: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    SiglipVisionModel(SiglipVisionConfig(image_size=SIZE, patch_size=8, **sizes)).save_pretrained(tmp_path / "siglip")
    SiglipImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, resample=Image.Resampling.BILINEAR, rescale_factor=1 / 127.5
    ).save_pretrained(tmp_path / "siglip")
    recipe = recipe_with(backend="transformers", name=str(tmp_path / "siglip"), resize_mode=mode)
    train(recipe, tmp_path / "run", console=quiet)
    model = sv.load(tmp_path / "run", device="cpu")
    assert model.processor is not None
    reference = AutoImageProcessor.from_pretrained(tmp_path / "siglip", backend="pil")
    for number in range(3):
        image = Image.open(tmp_path / f"{number}.png")
        expected = reference(image, return_tensors="pt")["pixel_values"]
        assert torch.equal(model.processor.image_processor(image)["pixel_values"], expected)
