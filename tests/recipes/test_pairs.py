"""Any supported encoder with any supported language model: one YAML file, one step of training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from symphony_vlm.config.loading import load_recipe
from symphony_vlm.data.scenes import generate_scenes
from symphony_vlm.training.run import train

VIT = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16, "mlp_ratio": 2.0}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32}
ENCODERS: dict[str, dict[str, Any]] = {
    "open_clip ViT": {"architecture": {"embed_dim": 32, "vision_cfg": VIT}},
    "open_clip ResNet": {"architecture": {"embed_dim": 32, "vision_cfg": RESNET}},
    "CLIP": {"backend": "transformers", "name": "openai/clip-vit-large-patch14-336"},
    "SigLIP": {"backend": "transformers", "name": "google/siglip-so400m-patch14-224"},
}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    kind: {"model_type": kind, **SIZES, "num_key_value_heads": 1, "max_position_embeddings": 512}
    for kind in ("llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gemma2", "gemma3_text", "smollm3")
}
for kind in ("qwen2", "phi", "phi3", "smollm3"):  # their heads are as wide as it takes
    del LANGUAGE_MODELS[kind]["head_dim"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two drawn pictures with questions."""
    folder = tmp_path_factory.mktemp("scenes")
    return generate_scenes(folder, train=2, test=1, seed=0, image_size=32, questions_per_image=1).train_json


def _pairs() -> list[Any]:
    """All; those in which neither part is the first of its kind are left to the slow tests."""
    first = (next(iter(ENCODERS)), next(iter(LANGUAGE_MODELS)))
    pairs = [(encoder, language) for encoder in ENCODERS for language in LANGUAGE_MODELS]
    return [
        pytest.param(*pair, marks=[] if pair[0] == first[0] or pair[1] == first[1] else pytest.mark.slow)
        for pair in pairs
    ]


@pytest.mark.parametrize(("encoder", "language"), _pairs())
def test_every_pair_builds_from_one_file_and_trains_one_step(
    encoder: str, language: str, tiny_parts: dict[str, str], scenes: Path, tmp_path: Path, quiet: Console
) -> None:
    vision = ENCODERS[encoder]
    if "name" in vision:
        vision = vision | {"name": tiny_parts[vision["name"]]}
    stage = {"name": "instruct", "kind": "multimodal", "upcycle": True, "max_steps": 1, "batch_size": 2}
    recipe = {
        "name": "pair",
        "data": {"train": str(scenes), "validation_fraction": 0.0},
        "model": {
            "template": "compact",
            "vision": vision,
            "language": {"vocab_size": 300, "architecture": LANGUAGE_MODELS[language]},
            "moe": {"num_experts": 2, "num_experts_per_tok": 1, "router": "smoe"},
        },
        "stages": [stage | {"train": {"projector": 1e-3, "language_model": 1e-3}}],
    }
    file = tmp_path / "pair.yaml"
    file.write_text(yaml.safe_dump(recipe))
    result = train(load_recipe(str(file)), tmp_path / "run", console=quiet)
    assert result.step == 1 and math.isfinite(result.loss)
