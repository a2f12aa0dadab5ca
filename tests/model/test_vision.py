"""Vision towers against the models they are cut out of: same features, no parameter without a use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from symphony_vlm.errors import InputError
from symphony_vlm.model.vision import OpenClipTower, VisionConfig, VisionTower, build_vision_tower, load_vision_tower

OPEN_CLIP = {
    "vit": {"image_size": 32, "patch_size": 8, "width": 16, "layers": 3, "head_width": 8},
    "vit, odd grid": {"image_size": 24, "patch_size": 8, "width": 16, "layers": 3, "head_width": 8},
    "vit, attentional pool": {
        "image_size": 32, "patch_size": 8, "width": 16, "layers": 3, "head_width": 8,
        "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4,
    },
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
    "timm vit": {"image_size": 160, "timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": ""},
    "timm resnet": {
        "image_size": 64, "timm_model_name": "test_resnet", "timm_model_pretrained": False, "timm_pool": "avg",
        "timm_proj": "linear",
    },
}  # fmt: skip
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
HUGGING_FACE = {
    "clip": (CLIPVisionModel, CLIPVisionConfig(image_size=32, patch_size=8, **SIZES)),
    # 3 x 3 patches: with the class token an even number, as in ViT-B/32 at 224 pixels.
    "clip, odd grid": (CLIPVisionModel, CLIPVisionConfig(image_size=24, patch_size=8, **SIZES)),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(image_size=32, patch_size=8, **SIZES)),
    "siglip, odd grid": (SiglipVisionModel, SiglipVisionConfig(image_size=24, patch_size=8, **SIZES)),
}
LAYERS = [-1, -2]


def pixels(size: int, number: int = 2) -> Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(0))


def open_clip_config(kind: str, **settings: Any) -> VisionConfig:
    cfg = OPEN_CLIP[kind]
    architecture = {"embed_dim": 12, "vision_cfg": cfg}
    return VisionConfig(backend="open_clip", architecture=architecture, image_size=cfg["image_size"], **settings)


def unpruned(config: VisionConfig) -> nn.Module:
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    torch.manual_seed(0)
    arch = config.architecture
    visual: nn.Module = _build_vision_tower(arch["embed_dim"], CLIPVisionCfg(**arch["vision_cfg"]))
    return visual.eval()


def save_hugging_face(kind: str, folder: Path) -> nn.Module:
    model_class, config = HUGGING_FACE[kind]
    torch.manual_seed(0)
    model: nn.Module = model_class(config).eval()
    model.save_pretrained(folder)
    CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return model


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", OPEN_CLIP)
def test_an_open_clip_tower_gives_the_intermediates_of_the_whole_encoder(kind: str, layer: int) -> None:
    config = open_clip_config(kind, feature_layer=layer)
    source = unpruned(config)
    tower = OpenClipTower(config).eval()
    tower.visual.load_state_dict({key: source.state_dict()[key] for key in tower.visual.state_dict()})
    images = pixels(config.image_size)
    with torch.no_grad():
        features_NPC = tower(images)
        reference = source.forward_intermediates(images, indices=[layer], intermediates_only=True)
    reference_NCHW = reference["image_intermediates"][0]
    # The same operations on the same numbers; only the layout differs.
    torch.testing.assert_close(features_NPC, reference_NCHW.flatten(2).transpose(1, 2), atol=1e-6, rtol=1e-6)
    assert features_NPC.shape[1:] == (tower.num_tokens, tower.hidden_size)


@pytest.mark.parametrize(("layer", "same"), [(1, -3), (2, -2), (3, -1)])
def test_positive_layers_count_from_the_first_block(layer: int, same: int) -> None:
    features = []
    for feature_layer in (layer, same):
        torch.manual_seed(0)
        tower = build_vision_tower(open_clip_config("vit", feature_layer=feature_layer)).eval()
        features.append(tower(pixels(32)))
    assert torch.equal(*features)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_a_hugging_face_tower_gives_the_hidden_states_of_the_saved_model(kind: str, layer: int, tmp_path: Path) -> None:
    source = save_hugging_face(kind, tmp_path)
    size = source.config.image_size
    images = pixels(size)
    for select in ("patch", "cls_patch"):
        tower = load_vision_tower("transformers", str(tmp_path), feature_layer=layer, feature_select=select).eval()
        with torch.no_grad():
            hidden = source(images, output_hidden_states=True).hidden_states[layer]
            features = tower(images)
        has_class_token = hidden.shape[1] == (size // 8) ** 2 + 1
        expected = hidden[:, 1:] if select == "patch" and has_class_token else hidden
        torch.testing.assert_close(features, expected, atol=1e-6, rtol=1e-6)
        assert (tower.num_tokens, tower.hidden_size) == expected.shape[1:]
    assert tower.config.image_mean == (0.1, 0.2, 0.3) and tower.config.image_std == (0.4, 0.5, 0.6)
    assert has_class_token is kind.startswith("clip")


def test_the_vision_half_of_a_whole_clip_model_is_taken(tmp_path: Path) -> None:
    config = CLIPConfig(
        vision_config=HUGGING_FACE["clip"][1].to_dict(), text_config={**SIZES, "vocab_size": 20}, projection_dim=8
    )
    torch.manual_seed(0)
    source = CLIPModel(config).eval()
    source.save_pretrained(tmp_path)
    CLIPImageProcessor().save_pretrained(tmp_path)
    tower = load_vision_tower("transformers", str(tmp_path)).eval()
    images = pixels(32)
    with torch.no_grad():
        hidden = source.vision_model(images, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(tower(images), hidden, atol=1e-6, rtol=1e-6)


def tower_of(kind: str, layer: int) -> VisionTower:
    if kind in OPEN_CLIP:
        return build_vision_tower(open_clip_config(kind, feature_layer=layer))
    config = HUGGING_FACE[kind][1]
    return build_vision_tower(
        VisionConfig(
            backend="transformers",
            architecture=config.to_dict(),
            image_size=config.image_size,
            feature_layer=layer,
            feature_select="cls_patch",
        )
    )


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", [*OPEN_CLIP, *HUGGING_FACE])
def test_every_parameter_of_a_tower_gets_a_gradient(kind: str, layer: int) -> None:
    """A parameter that is never used makes DDP wait for its gradient, and counts in every report of sizes."""
    tower = tower_of(kind, layer).train()
    tower(pixels(tower.config.image_size)).square().sum().backward()
    assert [name for name, parameter in tower.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_the_class_token_stands_in_front_if_wanted(kind: str) -> None:
    if kind == "vit":
        config = open_clip_config(kind, feature_select="cls_patch")
        torch.manual_seed(0)
        with_class = build_vision_tower(config).eval()
        torch.manual_seed(0)
        without = build_vision_tower(open_clip_config(kind)).eval()
        assert with_class.num_tokens == without.num_tokens + 1
        assert torch.equal(with_class(pixels(32))[:, 1:], without(pixels(32)))
    else:
        assert tower_of(kind, -1).num_tokens == 17


@pytest.mark.parametrize("layer", [0, 4, -4, 100])
@pytest.mark.parametrize("kind", ["vit", "timm vit", "clip"])
def test_a_layer_that_does_not_exist_is_refused(kind: str, layer: int) -> None:
    layer = layer * 10 if kind == "timm vit" else layer
    with pytest.raises(InputError, match=f"{layer} is no hidden layer"):
        tower_of(kind, layer)


def test_a_folder_of_the_encoder_stage_gives_the_same_features(tmp_path: Path) -> None:
    from symphony_vlm.training.contrastive import ContrastiveModel, save_open_clip

    torch.manual_seed(0)
    text = {"width": 16, "heads": 2, "layers": 1, "context_length": 8}
    model = ContrastiveModel({"embed_dim": 12, "vision_cfg": OPEN_CLIP["vit"], "text_cfg": text}, vocab_size=20).eval()
    save_open_clip(model, tmp_path, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6))
    tower = load_vision_tower("open_clip", str(tmp_path)).eval()
    images = pixels(32)
    with torch.no_grad():
        reference = model.clip.visual.forward_intermediates(images, indices=[-2], intermediates_only=True)
        expected = reference["image_intermediates"][0].flatten(2).transpose(1, 2)
        torch.testing.assert_close(tower(images), expected, atol=1e-6, rtol=1e-6)
    assert tower.config.image_mean == (0.1, 0.2, 0.3) and tower.config.image_std == (0.4, 0.5, 0.6)
    # The configuration alone rebuilds it: no folder is needed any more.
    rebuilt = build_vision_tower(VisionConfig.from_dict(tower.config.to_dict()))
    rebuilt.load_state_dict(tower.state_dict())
    assert torch.equal(rebuilt.eval()(images), tower(images))


def test_a_checkpoint_that_lacks_weights_is_refused_by_name(tmp_path: Path) -> None:
    from symphony_vlm.model.vision import _copy_weights

    tower = build_vision_tower(open_clip_config("vit"))
    weights = tower.visual.state_dict()
    weights.pop("conv1.weight")
    with pytest.raises(InputError, match=r"no conv1\.weight \(1 missing\)"):
        _copy_weights(tower.visual, weights)


@pytest.mark.parametrize(
    ("backend", "name", "pretrained", "match"),
    [
        ("open_clip", "ViT-B-33", None, "did you mean 'ViT-B-32'"),
        ("open_clip", "ViT-B-32", "laion2b_s34b_b79", "did you mean 'laion2b_s34b_b79k'"),
        ("timm", "x", None, "not one of open_clip, transformers"),
        ("transformers", "/no/such/folder", None, "/no/such/folder"),
    ],
)
def test_an_unknown_source_is_an_error_that_helps(backend: str, name: str, pretrained: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        load_vision_tower(backend, name, pretrained=pretrained)


def test_unknown_backends_and_settings_are_refused() -> None:
    values = open_clip_config("vit").to_dict()
    with pytest.raises(InputError, match="did you mean 'open_clip'"):
        build_vision_tower(VisionConfig.from_dict(values | {"backend": "openclip"}))
    with pytest.raises(InputError, match="did you mean 'feature_layer'"):
        VisionConfig.from_dict(values | {"feature_layers": 1})


def test_measuring_a_tower_neither_changes_its_state_nor_draws_random_numbers() -> None:
    torch.manual_seed(0)
    tower = build_vision_tower(open_clip_config("resnet"))
    assert all(int(v) == 0 for k, v in tower.state_dict().items() if k.endswith("num_batches_tracked"))
    assert not any(v.is_meta for v in tower.state_dict().values())
    assert np.isfinite(tower(pixels(64)).detach().numpy()).all()
