"""A recipe's model without weights: the configurations of its parts, and the whole on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from symphony_vlm.config.models import known_model
from symphony_vlm.config.recipe import ModelConfig
from symphony_vlm.data.tokenizer import ensure_special_tokens
from symphony_vlm.errors import InputError
from symphony_vlm.model.anyres import llava_next_pinpoints
from symphony_vlm.model.configuration import SymphonyVLMConfig
from symphony_vlm.model.loading import resolve_model_folder
from symphony_vlm.model.vision import VisionConfig, open_clip_architecture
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.installation import language_model_config

__all__ = [
    "embedding_rows",
    "folder_config",
    "language_config",
    "meta_language_model",
    "meta_model",
    "vision_config",
    "vision_settings",
]

LANGUAGE, VISION = "model.language.name", "model.vision.name"


def meta_model(model: ModelConfig) -> SymphonyVLMForConditionalGeneration:
    """The dense vision-language model as training builds it, on the meta device: shapes without memory or network.

    Raises:
        InputError: a part is neither described in the recipe, nor a local folder, nor in ``configs/models``.
    """
    text_config = language_config(model)
    text_config.vocab_size = embedding_rows(model, text_config)
    vision, tower = model.tower, vision_config(model)
    tiles = vision.grid_pinpoints or llava_next_pinpoints(tower.image_size)
    config = SymphonyVLMConfig(
        vision_config=tower.to_dict(),
        text_config=text_config,
        projector=model.projector,
        grid_pinpoints=tiles if vision.resize_mode == "anyres" else None,
    )
    with torch.device("meta"):
        return SymphonyVLMForConditionalGeneration(config)


def meta_language_model(model: ModelConfig) -> PreTrainedModel:
    """The causal LM of a language stage, dense or sparse, on the meta device.

    Raises:
        InputError: as `meta_model`.
    """
    config = folder_config(resolve_model_folder(model.start), "model.start") if model.start else language_config(model)
    if model.moe is not None:
        config = language_model_config(config, MoEConfig.from_dict(model.moe))
    with torch.device("meta"):
        result: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return result


def vision_settings(model: ModelConfig) -> dict[str, Any]:
    """What a recipe chooses about any tower."""
    vision = model.tower
    return {
        "feature_layer": vision.feature_layer,
        "feature_select": vision.feature_select,
        "scales": tuple(vision.scales),
    }


def vision_config(model: ModelConfig) -> VisionConfig:
    """The tower's configuration, from the recipe, a local folder, open_clip's own list, or ``configs/models``.

    Raises:
        InputError: it is in none of them.
    """
    vision, choose = model.tower, vision_settings(model)
    if vision.architecture is not None or vision.backend == "open_clip":
        arch = vision.architecture or _open_clip(vision.name or "")
        size = arch["vision_cfg"]["image_size"]
        return VisionConfig(
            backend="open_clip",
            architecture={key: arch[key] for key in ("embed_dim", "vision_cfg", "quick_gelu") if key in arch},
            image_size=size[0] if isinstance(size, (tuple, list)) else size,
            **choose,
        )
    assert vision.name is not None
    if Path(vision.name).is_dir():
        full = folder_config(vision.name, VISION)
        found = getattr(full, "vision_config", full)
        return VisionConfig(backend="transformers", architecture=found.to_dict(), image_size=found.image_size, **choose)
    known = known_model(vision.name, "vision", VISION)
    assert known.image_mean is not None and known.image_std is not None
    return VisionConfig(
        backend="transformers",
        architecture=known.architecture,
        image_size=known.architecture["image_size"],
        image_mean=known.image_mean,
        image_std=known.image_std,
        **choose,
    )


def language_config(model: ModelConfig) -> PreTrainedConfig:
    """The language model's configuration, from the recipe, a local folder, or ``configs/models``.

    `dtype` is that of the weights where they are pretrained. A new model has the vocabulary that its tokenizer may have
    at most.

    Raises:
        InputError: it is in none of them, or cannot be a configuration.
    """
    language = model.language
    if language.architecture is not None:
        try:
            config = AutoConfig.for_model(**language.architecture)
        except (ValueError, TypeError) as error:
            raise InputError(str(error).splitlines()[0][:200], where="model.language.architecture") from error
        config.vocab_size = language.vocab_size
        return _without_token_ids(config)
    assert language.name is not None
    if Path(language.name).is_dir():
        return folder_config(language.name, LANGUAGE)
    known = known_model(language.name, "language", LANGUAGE)
    return _without_token_ids(AutoConfig.for_model(**known.architecture, dtype=known.dtype))


def _without_token_ids(config: PreTrainedConfig) -> PreTrainedConfig:
    """A class's own defaults may lie outside of a small vocabulary; the tokenizer has the ids."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, None)
    return config


def embedding_rows(model: ModelConfig, config: PreTrainedConfig) -> int:
    """Rows of the embedding that training builds: it grows if the image placeholder or a pad token find no room."""
    name, rows = model.language.name, int(config.vocab_size)
    if name is None or model.random_weights:
        return rows
    if Path(name).is_dir():
        tokenizer = AutoTokenizer.from_pretrained(name)
        ensure_special_tokens(tokenizer)
        return max(rows, len(tokenizer))
    known = known_model(name, "language", LANGUAGE)
    assert known.tokenizer_size is not None
    return max(rows, known.tokenizer_size + 1 + (not known.has_pad_token))


def _open_clip(name: str) -> dict[str, Any]:
    is_folder = (Path(name) / "open_clip_config.json").is_file()
    return open_clip_architecture(f"local-dir:{name}" if is_folder else name)


def folder_config(folder: str, where: str) -> PreTrainedConfig:
    """The configuration in a local folder, else an `InputError`."""
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder!r} has no configuration that can be read: {str(error).splitlines()[0][:200]}", where=where
        ) from error
