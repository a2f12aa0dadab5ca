"""The parts that stages share and hand on: tokenizer, image processor, vision tower, language model."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from symphony_vlm.config.recipe import ModelConfig, Recipe
from symphony_vlm.corruptions import find_frost_textures, parse_corruptions
from symphony_vlm.data.augmentation import Augmentation
from symphony_vlm.data.sample import Sample
from symphony_vlm.data.templates import AUTO, get_template, resolve_template
from symphony_vlm.data.tokenizer import ensure_special_tokens, train_tokenizer
from symphony_vlm.errors import InputError
from symphony_vlm.model.anyres import new_image_newline
from symphony_vlm.model.configuration import SymphonyVLMConfig
from symphony_vlm.model.image_processor import ResizeMode, SymphonyImageProcessor
from symphony_vlm.model.processor import SymphonyVLMProcessor
from symphony_vlm.model.projector import build_projector
from symphony_vlm.model.vision import VisionConfig, VisionTower, build_vision_tower, load_vision_tower
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
from symphony_vlm.text import nearest
from symphony_vlm.training.skeleton import language_config, vision_config, vision_settings

__all__ = [
    "assemble",
    "check_architectures",
    "check_templates",
    "keep_precision_",
    "kept_tokenizer",
    "new_augmentation",
    "new_image_processor",
    "new_language_model",
    "open_tokenizer",
    "pretrained_tokenizer",
    "set_vocabulary",
]


_LEGACY_FIELDS = {"model_type", "rope_theta", "rope_scaling", "torch_dtype"}
"""Accepted by Hugging Face's configs although they are fields no more."""


def check_architectures(model: ModelConfig) -> None:
    """Checks the keys of new models before anything trains: Hugging Face's configs take any key and ignore it.

    Raises:
        InputError: an unknown key or model type; names the nearest.
    """
    vision = model.vision.architecture if model.vision else None
    language = model.language.architecture
    if vision is not None:
        from open_clip import CLIPTextCfg, CLIPVisionCfg

        where = "model.vision.architecture"
        _check_keys(vision, {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}, where)
        _check_keys(vision.get("vision_cfg", {}), _field_names(CLIPVisionCfg), f"{where}.vision_cfg")
        _check_keys(vision.get("text_cfg", {}), _field_names(CLIPTextCfg), f"{where}.text_cfg")
    if language is not None:
        from transformers import CONFIG_MAPPING

        where, kind = "model.language.architecture", language.get("model_type")
        if kind not in CONFIG_MAPPING:
            raise InputError(
                f"model_type {kind!r} is unknown to transformers{nearest(str(kind), CONFIG_MAPPING)}", where=where
            )
        config_class = CONFIG_MAPPING[kind]
        _check_keys(language, _field_names(config_class) | {*config_class.attribute_map, *_LEGACY_FIELDS}, where)


def _field_names(config_class: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)}


def _check_keys(values: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise InputError(f"unknown key {key!r}{nearest(key, known)}", where=where)


def open_tokenizer(
    model: ModelConfig, folder: Path, corpus: Iterable[Sequence[Sample]], stage_templates: Iterable[str] = ()
) -> Any:
    """The run's tokenizer: the pretrained language model's, or one trained on the corpus and kept in ``folder``.

    Args:
        model: the recipe's ``model``.
        folder: where a new tokenizer is kept.
        corpus: conversations for a new tokenizer.
        stage_templates: further templates whose markers a new tokenizer should hold.
    """
    if model.language.name is not None and not model.random_weights:
        tokenizer = pretrained_tokenizer(model)
        ensure_special_tokens(tokenizer)
        return tokenizer

    def make() -> Any:
        template = get_template("vicuna_v1" if model.template == AUTO else model.template)
        end = template.stop_token or "<|end|>"
        markers = [t for name in (template.name, *stage_templates) for t in get_template(name).special_tokens]
        texts = list(_texts(corpus))
        # With random weights as large as the vocabulary that the pretrained model has room for.
        size = language_config(model).vocab_size
        return train_tokenizer(texts, vocab_size=size, special_tokens=markers, end_token=end)

    return kept_tokenizer(folder, make)


def pretrained_tokenizer(model: ModelConfig) -> Any:
    """The tokenizer of ``model.language.name``."""
    from transformers import AutoTokenizer

    assert model.language.name is not None
    return _from_hub(AutoTokenizer, model.language.name, "model.language.name")


def kept_tokenizer(folder: Path, make: Callable[[], Any]) -> Any:
    """The tokenizer in a folder; made and put there if there is none yet."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        # Saved next to its place and renamed, so that a kill leaves no half of it to be opened by the next start.
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        make().save_pretrained(temporary)
        temporary.rename(folder)
    return AutoTokenizer.from_pretrained(folder)


def check_templates(templates: Iterable[str], tokenizer: Any) -> None:
    """Checks before anything trains that the tokenizer fits the templates of all stages.

    Raises:
        InputError: see `data.templates.resolve_template`.
    """
    for name in templates:
        resolve_template(name, tokenizer)


def _texts(corpus: Iterable[Sequence[Sample]]) -> Iterator[str]:
    for samples in corpus:
        for i in range(len(samples)):
            yield from (message.text for message in samples[i].messages)


def new_language_model(model: ModelConfig, tokenizer: Any, folder: Path | None) -> Any:
    """The dense language model: from the language stage's folder, pretrained, or new, perhaps in a known form."""
    from transformers import AutoModelForCausalLM

    if folder is not None:
        language_model = AutoModelForCausalLM.from_pretrained(folder)
    elif model.language.name is not None and not model.random_weights:
        language_model = _from_hub(AutoModelForCausalLM, model.language.name, "model.language.name")
    else:
        config = language_config(model)
        set_vocabulary(config, tokenizer, resize=model.language.architecture is not None)
        language_model = AutoModelForCausalLM.from_config(config)
    if len(tokenizer) > language_model.config.vocab_size:
        language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return language_model


def set_vocabulary(config: Any, tokenizer: Any, *, resize: bool = True) -> None:
    """The tokenizer's special tokens in a new model's configuration, and its size if that is not prescribed."""
    if resize:
        config.vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))


def new_vision_tower(model: ModelConfig, encoder: Path | None) -> VisionTower:
    """The vision tower: from the encoder stage's folder, pretrained, or new."""
    vision, choose = model.tower, vision_settings(model)
    if encoder is not None:
        return load_vision_tower("open_clip", str(encoder), **choose)
    if vision.name is not None and not model.random_weights:
        return load_vision_tower(vision.backend, vision.name, pretrained=vision.pretrained, **choose)
    if vision.name is not None and vision.backend == "open_clip":
        return load_vision_tower(vision.backend, vision.name, **choose)
    return build_vision_tower(vision_config(model))


def new_image_processor(model: ModelConfig, tower: VisionConfig | None = None) -> SymphonyImageProcessor:
    """Prepares images as the tower needs them; before there is a tower, as the architecture says.

    A new encoder is trained on whole images at one scale, however the model will look at them later.
    """
    vision = model.tower
    if tower is not None:
        return SymphonyImageProcessor(
            tower.input_size,
            tower.image_mean,
            tower.image_std,
            resize_mode=vision.resize_mode,
            interpolation=tower.interpolation,
            rescale_factor=tower.rescale_factor,
            grid_pinpoints=vision.grid_pinpoints,
            preprocessing=tower.preprocessing if vision.resize_mode == "encoder" else None,
        )
    assert vision.architecture is not None
    mode: ResizeMode = "stretch" if vision.resize_mode == "anyres" else vision.resize_mode
    return SymphonyImageProcessor(vision.architecture["vision_cfg"]["image_size"], resize_mode=mode)


def new_augmentation(recipe: Recipe) -> Augmentation | None:
    """What happens to pictures that are trained on, if anything.

    Raises:
        InputError: frost is among the corruptions and its textures are not there.
    """
    settings = recipe.data.augmentation
    if settings is None:
        return None
    names = parse_corruptions(",".join(settings.corruptions))
    if "frost" in names:
        find_frost_textures()
    return Augmentation(
        corruptions=tuple(names),
        severities=tuple(settings.severities),
        probability=settings.probability,
        seed=recipe.seed,
    )


def assemble(
    model: ModelConfig, tokenizer: Any, *, encoder: Path | None, language: Path | None
) -> SymphonyVLMForConditionalGeneration:
    """The dense vision-language model from its parts, with a new projector and its processor attached."""
    tower = new_vision_tower(model, encoder)
    language_model = new_language_model(model, tokenizer, language)
    processor = SymphonyVLMProcessor(
        new_image_processor(model, tower.config), tokenizer, tower.num_tokens, template=model.template
    )
    config = SymphonyVLMConfig(
        vision_config=tower.config.to_dict(),
        text_config=language_model.config,
        projector=model.projector,
        image_token_id=processor.image_token_id,
        num_image_tokens=tower.num_tokens,
        grid_pinpoints=processor.image_processor.grid_pinpoints,
    )
    # Only the skeleton is built, without memory, and the parts are put into it: never two copies of the weights.
    with torch.device("meta"):
        vlm = SymphonyVLMForConditionalGeneration(config)
    vlm.vision_tower = tower
    vlm.language_model = language_model
    vlm.projector = build_projector(model.projector, tower.hidden_size, config.hidden_size)
    if vlm.image_newline is not None:
        vlm.image_newline = new_image_newline(config.hidden_size)
    stops = processor.stop_token_ids
    vlm.generation_config.eos_token_id = stops[0] if len(stops) == 1 else stops
    vlm.generation_config.pad_token_id = tokenizer.pad_token_id
    vlm.processor = processor
    return vlm


@torch.no_grad()
def keep_precision_(model: torch.nn.Module, *, bf16: bool) -> None:
    """Casts to fp32 what trains, and without autocast everything: pretrained weights are often in 16 bits.

    A 16-bit weight does not move when a step is smaller than a thousandth of it, as at a rate of 2e-5 most are; and its
    optimizer would keep its averages in 16 bits. What is frozen may stay as it is where autocast (`bf16`) joins it.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.bfloat16, torch.float16) and (tensor.requires_grad or not bf16):
            tensor.data = tensor.data.float()


def _from_hub(auto_class: Any, name: str, where: str) -> Any:
    try:
        return auto_class.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name!r} cannot be opened: {str(error).splitlines()[0][:200]}",
            where=where,
            remedy="Give a local folder, or a hub id while online.",
        ) from error
