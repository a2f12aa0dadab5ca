"""Turns the feed-forward layers of a dense causal LM into mixtures of experts (sparse upcycling, arXiv 2212.05055).

Layers are recognised by their parts, never by a model's name: a decoder layer is a module with an ``mlp`` that has
``gate_proj``, ``up_proj`` and ``down_proj`` (Llama, Mistral, Qwen2, Qwen3, SmolLM).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from symphony_vlm.errors import InputError
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.layer import SparseMoE
from symphony_vlm.moe.recording import RoutingRecorder

__all__ = ["MAX_LOGIT_DIFFERENCE", "install_moe_", "upcycle_"]

MAX_LOGIT_DIFFERENCE = 1e-5
"""Largest difference of logits that upcycling may cause in fp32, relative to the largest logit where that exceeds 1.
Identical experts whose weights sum to 1 give the dense output exactly but for the rounding of w1 * y + w2 * y against
y, about 1e-7 relative per layer."""


def decoder_layers(model: nn.Module) -> Any:
    """The list of decoder layers of a causal LM.

    Raises:
        InputError: the model has no such list, or it is ambiguous.
    """
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0 and all(hasattr(layer, "mlp") for layer in module)
    ]
    if len(found) != 1:
        raise InputError(
            f"{type(model).__name__} has {len(found)} lists of layers with an 'mlp', exactly one is needed",
            where="language model",
            remedy="Supported: Llama, Mistral, Qwen2, Qwen3 and models built like them.",
        )
    return found[0]


def install_moe_(language_model: PreTrainedModel, config: MoEConfig) -> RoutingRecorder:
    """Replaces the chosen feed-forward layers by empty sparse ones, in place: the structure, not the weights.

    Loading a checkpoint does this and then fills in the weights; `upcycle_` copies the dense ones.
    """
    layers = decoder_layers(language_model)
    for index in config.sparse_layers(len(layers)):
        dense = layers[index].mlp
        hidden_size, intermediate_size = _dense_sizes(dense, index)
        layers[index].mlp = SparseMoE(
            config,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            hidden_act=_activation_name(language_model),
            layer_index=index,
        ).to(dense.down_proj.weight.dtype)
    return RoutingRecorder.attach(language_model, config)


@torch.no_grad()
def upcycle_(language_model: PreTrainedModel, config: MoEConfig, *, seed: int = 0) -> RoutingRecorder:
    """Upcycles a dense causal LM in place and proves that its function has not changed.

    Every selected feed-forward layer is copied into E experts, with optional noise; the gate is new, N(0, 0.02),
    seeded by (seed, layer). With ``expert_init_noise: 0`` and ``renormalize: true`` logits before and after must agree
    to `MAX_LOGIT_DIFFERENCE` (in fp32), and the function raises otherwise.

    Returns:
        The recorder of router outputs, also left at ``language_model.routing``.

    Raises:
        InputError: a layer cannot be upcycled.
        RuntimeError: the logits changed; the model is left upcycled for inspection.
    """
    probe = _probe_ids(language_model)
    before = _logits(language_model, probe)
    layers = decoder_layers(language_model)
    dense = {index: layers[index].mlp for index in config.sparse_layers(len(layers))}
    recorder = install_moe_(language_model, config)
    generator = torch.Generator().manual_seed(seed)
    for index, mlp in dense.items():
        sparse: SparseMoE = layers[index].mlp.to(mlp.down_proj.weight.device)
        sparse.train(mlp.training)
        sparse.reset(seed=seed)
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        _copy_to_experts(sparse.experts.gate_up_proj, gate_up, config.expert_init_noise, generator)
        _copy_to_experts(sparse.experts.down_proj, mlp.down_proj.weight, config.expert_init_noise, generator)
    language_model.routing = recorder
    if config.expert_init_noise == 0 and config.renormalize and before.dtype == torch.float32:
        difference = float((_logits(language_model, probe) - before).abs().max())
        allowed = MAX_LOGIT_DIFFERENCE * max(1.0, float(before.abs().max()))
        if not difference <= allowed:
            raise RuntimeError(
                f"upcycling changed the logits by {difference:.2e}, more than {allowed:.0e}; "
                "this is a fault in the conversion, please report it with the model's configuration"
            )
    return recorder


def _copy_to_experts(stacked: Tensor, weight: Tensor, noise: float, generator: torch.Generator) -> None:
    stacked.copy_(weight.expand_as(stacked))
    if noise > 0:
        draw = torch.randn(stacked.shape, generator=generator, dtype=torch.float32)
        stacked += (noise * weight.float().std() * draw.to(stacked.device)).to(stacked.dtype)


def _dense_sizes(mlp: nn.Module, index: int) -> tuple[int, int]:
    """(hidden size, intermediate size) of a dense gated feed-forward layer."""
    parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(part, nn.Linear) for part in parts):
        raise InputError(
            f"layer {index} has a {type(mlp).__name__} as its mlp; gate_proj, up_proj and down_proj are needed",
            where="moe.layers",
            remedy="Supported: Llama, Mistral, Qwen2, Qwen3 and models built like them.",
        )
    if any(part.bias is not None for part in parts if isinstance(part, nn.Linear)):
        raise InputError(
            f"the feed-forward of layer {index} has biases, which stacked experts do not hold",
            where="moe.layers",
            remedy="Use a language model with mlp_bias=False.",
        )
    down = parts[2]
    assert isinstance(down, nn.Linear)
    return down.out_features, down.in_features


def _activation_name(language_model: PreTrainedModel) -> str:
    config = language_model.config.get_text_config()
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def _probe_ids(language_model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vocab_size = language_model.config.get_text_config().vocab_size
    return torch.randint(0, vocab_size, (2, 16), generator=generator).to(language_model.device)


def _logits(language_model: PreTrainedModel, ids: Tensor) -> Tensor:
    was_training = language_model.training
    language_model.eval()
    logits = language_model(input_ids=ids, use_cache=False).logits
    language_model.train(was_training)
    return logits
