"""A whole vision-language model as transformers' Llava: configuration, weights, processor."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlavaConfig, PreTrainedConfig

from symphony_vlm.data.tokenizer import IMAGE_TOKEN
from symphony_vlm.errors import InputError
from symphony_vlm.model.stock_text import stock_text_config, stock_text_weights
from symphony_vlm.model.vision import HuggingFaceTower, OpenClipTower, VisionTower
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["llava_config", "llava_weights", "save_llava_processor"]

CLASS_TOKEN = {"clip_vision_model": True, "siglip_vision_model": False}
"""Towers that Llava can have here, and whether the first feature is a class token."""


def llava_config(model: SymphonyVLMForConditionalGeneration) -> LlavaConfig:
    """The configuration of the Llava that computes what a model computes.

    Raises:
        InputError: there is none; the message names the setting that is in the way.
    """
    moe = model.config.moe_config
    if moe is not None and moe.modules != ("language",):
        raise InputError(
            f"{list(moe.modules)!r} cannot be expressed: Llava has experts in its language model alone",
            where="moe.modules",
            remedy="Only a model with modules: [language] can be exported.",
        )
    if model.config.projector != "mlp2x_gelu":
        raise InputError(
            f"{model.config.projector!r} cannot be expressed: Llava's projector has two layers",
            where="projector",
            remedy="Only a model with projector: mlp2x_gelu can be exported.",
        )
    _check_images(model)
    text = stock_text_config(model.language_model)
    return LlavaConfig(
        vision_config=_vision_config(model.vision_tower),
        text_config=text,
        image_token_index=model.config.image_token_id,
        image_seq_length=model.config.num_image_tokens,
        projector_hidden_act="gelu",
        vision_feature_select_strategy=_select_strategy(model.vision_tower),
        # The blocks above the feature layer are left out here, so it is the last.
        vision_feature_layer=-1,
        tie_word_embeddings=bool(text.tie_word_embeddings),
        dtype=model.dtype,
    )


def _check_images(model: SymphonyVLMForConditionalGeneration) -> None:
    """Refuses what Llava does not do with an image."""
    processor = model.processor
    mode = None if processor is None else processor.image_processor.resize_mode
    if model.config.grid_pinpoints is not None or mode == "encoder":
        raise InputError(
            f"{'anyres' if mode is None else mode!r} cannot be expressed: Llava's images are padded, cropped or "
            "stretched",
            where="vision.resize_mode",
            remedy="Only a model with resize_mode: pad, crop or stretch can be exported.",
        )
    scales = model.vision_tower.config.scales
    if len(scales) > 1:
        raise InputError(
            f"{list(scales)} cannot be expressed: Llava sees an image at one scale",
            where="vision.scales",
            remedy="Only a model with scales: [1] can be exported.",
        )


def llava_weights(model: SymphonyVLMForConditionalGeneration) -> dict[str, Tensor]:
    """Weights by their names in Llava.

    Raises:
        InputError: a router cannot be folded into a linear gate.
    """
    weights = {f"model.vision_tower.{name}": weight for name, weight in _vision_weights(model.vision_tower).items()}
    for name, weight in model.projector.state_dict().items():
        number, kind = name.split(".")
        weights[f"model.multi_modal_projector.linear_{1 if number == '0' else 2}.{kind}"] = weight
    body = f"{model.language_model.base_model_prefix}."
    for name, weight in stock_text_weights(model.language_model).items():
        stock = f"model.language_model.{name.removeprefix(body)}" if name.startswith(body) else name
        weights[stock] = weight
    return weights


def _vision_config(tower: VisionTower) -> PreTrainedConfig:
    if isinstance(tower, OpenClipTower):
        return _clip_config(tower)
    assert isinstance(tower, HuggingFaceTower)
    config = tower.model.config
    if config.model_type not in CLASS_TOKEN:
        raise _no_such_tower(tower, "architecture.model_type", config.model_type)
    return copy.deepcopy(config)


def _vision_weights(tower: VisionTower) -> dict[str, Tensor]:
    if isinstance(tower, OpenClipTower):
        weights = _clip_weights(tower)
    else:
        assert isinstance(tower, HuggingFaceTower)
        weights = dict(tower.model.state_dict())
    # The norm that a tower here lacks: behind the feature layer, it has no effect on what Llava takes.
    like = weights["encoder.layers.0.layer_norm1.weight"]
    return weights | {
        "post_layernorm.weight": like.new_ones(like.shape),
        "post_layernorm.bias": like.new_zeros(like.shape),
    }


def _select_strategy(tower: VisionTower) -> str:
    """Llava's ``default`` drops the first feature, whatever it is."""
    has_class_token = CLASS_TOKEN[_vision_config(tower).model_type]
    return "default" if has_class_token and tower.config.feature_select == "patch" else "full"


def _no_such_tower(tower: VisionTower, setting: str, value: object) -> InputError:
    return InputError(
        f"{value!r} cannot be expressed: of the vision towers here, transformers' Llava can have CLIP and SigLIP, and "
        "open_clip's plain vision transformers",
        where=f"vision_config.{setting}",
        remedy=f"Only a model with one of these towers can be exported, not this {tower.config.backend} one.",
    )


# --- open_clip's vision transformers are CLIP's under other names


_NOT_IN_CLIP = (
    "timm_model_name",
    "ls_init_value",
    "no_ln_pre",
    "act_kwargs",
    "block_type",
    "qk_norm",
    "scaled_cosine_attn",
    "scale_heads",
    "scale_attn_inner",
    "scale_attn",
    "scale_fc",
)
"""Settings of open_clip that change the function of a block and that CLIP in transformers lacks."""


def _clip_config(tower: OpenClipTower) -> CLIPVisionConfig:
    settings = tower.config.architecture["vision_cfg"]
    for name in _NOT_IN_CLIP:
        if settings.get(name):
            raise _no_such_tower(tower, f"architecture.vision_cfg.{name}", settings[name])
    if not hasattr(tower.visual, "transformer"):
        raise _no_such_tower(tower, "architecture.vision_cfg.layers", settings["layers"])
    visual: Any = tower.visual
    block = visual.transformer.resblocks[0]
    return CLIPVisionConfig(
        hidden_size=block.mlp.c_fc.in_features,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(visual.transformer.resblocks),
        num_attention_heads=block.attn.num_heads,
        image_size=tower.config.image_size,
        patch_size=visual.conv1.kernel_size[0],
        hidden_act="gelu" if isinstance(block.mlp.gelu, nn.GELU) else "quick_gelu",
        layer_norm_eps=block.ln_1.eps,
    )


_CLIP_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
}
_CLIP_BLOCK_NAMES = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


def _clip_weights(tower: OpenClipTower) -> dict[str, Tensor]:
    source = tower.visual.state_dict()
    weights = {stock: source[name] for name, stock in _CLIP_NAMES.items()}
    for index in range(len(tower.visual.transformer.resblocks)):
        ours, stock = f"transformer.resblocks.{index}.", f"encoder.layers.{index}."
        for kind in ("weight", "bias"):
            for name, renamed in _CLIP_BLOCK_NAMES.items():
                weights[f"{stock}{renamed}.{kind}"] = source[f"{ours}{name}.{kind}"]
            for name, part in zip("qkv", source[f"{ours}attn.in_proj_{kind}"].chunk(3), strict=True):
                weights[f"{stock}self_attn.{name}_proj.{kind}"] = part.clone()  # apart, as they are saved
            weights[f"{stock}self_attn.out_proj.{kind}"] = source[f"{ours}attn.out_proj.{kind}"]
    return weights


# --- the processor


def save_llava_processor(model: SymphonyVLMForConditionalGeneration, folder: Path) -> None:
    """Saves a processor that ``AutoProcessor`` opens, if the model has one.

    Prompts are the same. So are pixels with Pillow's backend.
    """
    if model.processor is None:
        return
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    ours = model.processor
    images, size = ours.image_processor, ours.image_processor.image_size
    square = {"height": size, "width": size}
    strategy = _select_strategy(model.vision_tower)
    vision = _vision_config(model.vision_tower)
    processor = LlavaProcessor(
        LlavaImageProcessorPil(
            do_pad=images.resize_mode == "pad",
            size={"shortest_edge": size} if images.resize_mode == "crop" else square,
            do_center_crop=images.resize_mode == "crop",
            crop_size=square,
            resample=Image.Resampling[images.interpolation.upper()],
            rescale_factor=images.rescale_factor,
            image_mean=images.image_mean,
            image_std=images.image_std,
        ),
        ours.tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(CLASS_TOKEN[vision.model_type]),
        image_token=IMAGE_TOKEN,
        chat_template=ours.chat_template,
    )
    processor.save_pretrained(folder)
