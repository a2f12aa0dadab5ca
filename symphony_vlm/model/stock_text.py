"""A language model with sparse layers as one of transformers' own classes: its configuration and its weights.

Shape letters: D hidden size, E experts.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from symphony_vlm.errors import InputError
from symphony_vlm.moe.feed_forward import layers_with_mlp
from symphony_vlm.moe.folding import folded_gate
from symphony_vlm.moe.layer import SparseMoE
from symphony_vlm.moe.recording import sparse_layers

__all__ = ["stock_text_config", "stock_text_weights"]

TARGETS = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
"""``model_type`` of dense models and of the mixture of experts that is the same but for its feed-forward layers."""

NATIVE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
"""Mixtures of experts whose routers were taken over; they go back into their own class."""


def stock_text_config(language_model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of the class of transformers that computes what a language model computes.

    Args:
        language_model: a causal LM; a dense one keeps its own configuration.

    Raises:
        InputError: there is no such class; the message names the setting that is in the way.
    """
    source = language_model.config
    family = source.model_type
    if family not in (*TARGETS, *NATIVE):
        raise InputError(
            f"transformers has no mixture of experts of the form of {family!r}",
            where="text_config.model_type",
            remedy=f"It has them for {', '.join(TARGETS)}, and {', '.join(NATIVE)} go back into their own class.",
        )
    sparse = _sparse_by_index(language_model)
    if not sparse or family in NATIVE:
        return copy.deepcopy(source)
    first = next(iter(sparse.values()))
    target = TARGETS[family]
    values = _carried_over(source, target)
    values |= {"num_experts_per_tok": first.router.config.num_experts_per_tok, "num_experts": first.experts.num_experts}
    if target == "mixtral":
        _check_that_mixtral_has(first, len(sparse), source.num_hidden_layers)
        values["num_local_experts"] = values.pop("num_experts")
        values["intermediate_size"] = first.experts.down_proj.shape[2]
    else:
        values |= _qwen_values(first, sparse, source)
    return AutoConfig.for_model(target, **values)


def stock_text_weights(language_model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights by their names in the class of `stock_text_config`; all but the gates share the model's memory.

    Gates are fp32, as they are here: the class casts them when it is opened in another precision.

    Raises:
        InputError: a router cannot be folded into a linear gate.
    """
    weights: dict[str, Tensor] = dict(language_model.state_dict())
    for name, layer in sparse_layers(language_model):
        for key in [key for key in weights if key.startswith(f"{name}.router.")]:
            del weights[key]
        weights[f"{name}.gate.weight"] = folded_gate(layer.router)
        if language_model.config.model_type == "qwen2" and layer.shared_expert is None:
            weights |= {f"{name}.{key}": weight for key, weight in _no_shared_expert(layer).items()}
    return weights


def _sparse_by_index(language_model: PreTrainedModel) -> dict[int, SparseMoE]:
    layers = layers_with_mlp(language_model)
    return {index: layer.mlp for index, layer in enumerate(layers) if isinstance(layer.mlp, SparseMoE)}


def _carried_over(source: PreTrainedConfig, target: str) -> dict[str, Any]:
    """Settings of the dense model that the target has too.

    Raises:
        InputError: the target lacks one, and it is not at its default.
    """
    values = source.to_dict()
    known = set(AutoConfig.for_model(target).to_dict()) | {"head_dim"}
    # Which layers attend to a window is the class's own affair in Qwen3-MoE, see `_qwen_values`.
    defaults = {k: v for k, v in type(source)().to_dict().items() if k not in ("layer_types", "max_window_layers")}
    for name, default in defaults.items():
        if name not in known and values.get(name, default) != default:
            raise InputError(
                f"{values[name]!r} has no counterpart in {target}",
                where=f"text_config.{name}",
                remedy=f"Only a model with {name}: {default!r} can be exported.",
            )
    left_out = {"model_type", "architectures", "transformers_version", "_name_or_path"}
    return {k: v for k, v in values.items() if k in known and k not in left_out and not (k == "head_dim" and v is None)}


def _check_that_mixtral_has(layer: SparseMoE, num_sparse: int, num_layers: int) -> None:
    config = layer.router.config
    for name, has, problem, remedy in (
        (
            "layers",
            num_sparse == num_layers,
            f"{num_sparse} of the {num_layers} layers are sparse, and all layers of Mixtral are",
            "layers: all",
        ),
        ("renormalize", config.renormalize, "Mixtral always divides the weights by their sum", "renormalize: true"),
        ("shared_expert", layer.shared_expert is None, "Mixtral has no shared expert", "shared_expert: false"),
    ):
        if not has:
            raise InputError(
                f"{getattr(config, name)!r} cannot be expressed: {problem}",
                where=f"moe.{name}",
                remedy=f"Only a model with {remedy} can be exported; Qwen has classes for more.",
            )


def _qwen_values(first: SparseMoE, sparse: dict[int, SparseMoE], source: PreTrainedConfig) -> dict[str, Any]:
    """Settings of Qwen2-MoE and Qwen3-MoE that their dense siblings lack."""
    values = {
        "moe_intermediate_size": first.experts.down_proj.shape[2],
        "norm_topk_prob": first.router.config.renormalize,
        "mlp_only_layers": [index for index in range(source.num_hidden_layers) if index not in sparse],
        "decoder_sparse_step": 1,
    }
    if source.model_type == "qwen2":
        shared: Any = first.shared_expert
        return values | {
            "qkv_bias": True,
            "shared_expert_intermediate_size": 0 if shared is None else shared.down_proj.in_features,
        }
    if first.shared_expert is not None:
        raise InputError(
            "True cannot be expressed: Qwen3-MoE has no shared expert",
            where="moe.shared_expert",
            remedy="Only a model with shared_expert: false can be exported; Qwen2's class has one.",
        )
    windows = {kind == "sliding_attention" for kind in source.layer_types}
    if len(windows) > 1:
        raise InputError(
            f"{source.max_window_layers} cannot be expressed: in Qwen3-MoE all layers attend to a window or none does",
            where="text_config.max_window_layers",
            remedy="Only a model with use_sliding_window: false can be exported.",
        )
    return values | {"use_sliding_window": windows == {True}}


def _no_shared_expert(layer: SparseMoE) -> dict[str, Tensor]:
    """Qwen2-MoE always has a shared expert; one of size 0 adds 0."""
    hidden_size, like = layer.experts.gate_up_proj.shape[2], layer.experts.down_proj
    ups = {f"shared_expert.{name}.weight": like.new_zeros(0, hidden_size) for name in ("gate_proj", "up_proj")}
    down = {"shared_expert.down_proj.weight": like.new_zeros(hidden_size, 0)}
    return ups | down | {"shared_expert_gate.weight": torch.zeros(1, hidden_size, dtype=like.dtype, device=like.device)}
