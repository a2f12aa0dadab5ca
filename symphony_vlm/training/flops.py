"""Model FLOPs of a training step, and what a device can do at most.

Counted as in PaLM (arXiv 2204.02311, appendix B) and nanoGPT: what the mathematics of the model asks for, not what the
machine does. A weight matrix costs 2 FLOPs per weight and token in the forward pass, 2 for the gradient of its input
and 2 for its own; attention costs 4 H Q per pair of a token and what it attends to, and twice that backwards (all
pairs, as in PaLM, though causal attention needs half). Where nothing trains in front of a matrix, or the matrix itself
is frozen, the part of the gradient that nobody needs is not counted. Of E experts the K chosen count. Logits count at
supervised positions only. Activation checkpointing's second forward pass and padding do not count.

H attention heads, Q size of a head.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from symphony_vlm.model.projector import build_projector
from symphony_vlm.model.vision import build_vision_tower
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
from symphony_vlm.moe.layer import SparseMoE
from symphony_vlm.moe.recording import sparse_layers
from symphony_vlm.training.batch_sizes import BatchSizes
from symphony_vlm.training.contrastive import ContrastiveModel

__all__ = ["TrainingFlops", "peak_tflops", "training_flops"]


@dataclass(frozen=True, kw_only=True)
class TrainingFlops:
    """FLOPs of forward and backward pass by what they grow with."""

    token: float = 0.0
    """Per real token."""
    supervised: float = 0.0
    """Per token that is predicted: the language model's head."""
    tile: float = 0.0
    """Per square that enters the vision tower, or the projector where the tower's features are cached."""
    sample: float = 0.0
    """Per image-caption pair of a contrastive stage."""
    pairs: tuple[tuple[int | None, float], ...] = ()
    """Per pair of a token and a token of its sequence, by the attention window of the layers (None: all of it)."""

    def of(self, sizes: BatchSizes) -> float:
        """FLOPs of a batch."""
        flops = self.token * sizes.tokens + self.supervised * sizes.supervised
        flops += self.tile * sizes.tiles + self.sample * sizes.samples
        for window, per_pair in self.pairs:
            flops += per_pair * sum(n * min(n, window or n) for n in sizes.lengths)
        return flops


def training_flops(model: nn.Module, *, cached_features: bool = False) -> TrainingFlops:
    """FLOPs of a model with those parameters training that require a gradient now.

    Args:
        model: a vision-language model, a causal LM, or a `ContrastiveModel`.
        cached_features: whether the vision tower's output comes from a cache.
    """
    if isinstance(model, ContrastiveModel):
        return TrainingFlops(sample=_per_pair_of_image_and_caption(model))
    if not isinstance(model, SymphonyVLMForConditionalGeneration):
        return _language_flops(model, reached=False, all_logits=True)
    front = [*model.vision_tower.parameters(), *model.projector.parameters()]
    reached = any(p.requires_grad for p in front) or (
        model.image_newline is not None and model.image_newline.requires_grad
    )
    flops = _language_flops(model.language_model, reached=reached, all_logits=False)
    tile = _per_tile(model, cached_features)
    return TrainingFlops(token=flops.token, supervised=flops.supervised, tile=tile, pairs=flops.pairs)


def _language_flops(model: Any, *, reached: bool, all_logits: bool) -> TrainingFlops:
    """Of a causal LM.

    Args:
        model: the language model.
        reached: whether something in front of it trains, so that gradients go through all of it.
        all_logits: whether there are logits everywhere, not at supervised positions alone.
    """
    config = model.config.get_text_config()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    reached = reached or any(p.requires_grad for p in embedding.parameters())
    layers = _decoder_layers(model, config.num_hidden_layers)
    token, pairs = 0.0, defaultdict[int | None, float](float)
    active: dict[nn.Module, float] = {}
    for module in model.modules():  # in the order of the forward pass
        if module is head or isinstance(module, nn.Embedding):
            continue
        if isinstance(module, SparseMoE):
            active[module.experts] = module.router.config.num_experts_per_tok / module.experts.num_experts
        if module in layers:
            norm = getattr(module, "input_layernorm", None)  # comes first, whatever the order of the attributes
            reached = reached or (norm is not None and any(p.requires_grad for p in norm.parameters()))
            trains = any(p.requires_grad for name, p in module.named_parameters() if "attn" in name)
            window, per_pair = _attention(config, layers[module])
            pairs[window] += per_pair * (3 if reached or trains else 1)
        for name, parameter in module.named_parameters(recurse=False):
            share = active.get(module) or _share_of_native_experts(config, parameter)
            token += share * _matrix_flops(module, name, parameter, reached)
            reached = reached or parameter.requires_grad
    logits = _matrix_flops(head, "weight", head.weight, reached)
    at_tokens, at_targets = (token + logits, 0.0) if all_logits else (token, logits)
    return TrainingFlops(token=at_tokens, supervised=at_targets, pairs=tuple((w, n) for w, n in pairs.items() if n))


def _matrix_flops(module: nn.Module, name: str, parameter: Tensor, reached: bool) -> float:
    """Per token; vectors (norms, biases) cost nothing that counts."""
    # Weights of 4 bits are packed and those of ZeRO-3 taken apart, but their layers know how large they are.
    shape: Sequence[int] = getattr(parameter, "ds_shape", parameter.shape)
    if isinstance(module, nn.Linear) and name == "weight":
        shape = (module.out_features, module.in_features)
    if len(shape) < 2:
        return 0.0
    return 2.0 * math.prod(shape) * (1 + int(parameter.requires_grad) + int(reached))


def _share_of_native_experts(config: Any, parameter: Tensor) -> float:
    """Of the stacked experts of transformers' own classes."""
    num_active = getattr(config, "num_experts_per_tok", None)
    return num_active / parameter.shape[0] if parameter.dim() == 3 and num_active else 1.0


def _decoder_layers(model: nn.Module, num_layers: int) -> dict[nn.Module, int]:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    return {layer: index for index, layer in enumerate(lists[0])} if lists else {}


def _attention(config: Any, layer: int) -> tuple[int | None, float]:
    """Window of a layer's attention and its forward FLOPs per pair of tokens."""
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds else "full_attention"
    if kind == "linear_attention":
        return None, 0.0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    is_sliding = kind == "sliding_attention" if kinds else True
    window = getattr(config, "sliding_window", None) if is_sliding else None
    return window, 4.0 * config.num_attention_heads * head_dim


class _Front(nn.Module):
    """What comes before the language model, dense, for counting on the meta device."""

    def __init__(self, model: SymphonyVLMForConditionalGeneration) -> None:
        super().__init__()
        self.vision_tower = build_vision_tower(model.vision_tower.config)
        self.projector = build_projector(
            model.config.projector, model.vision_tower.hidden_size, model.config.hidden_size
        )

    def forward(self, inputs: Tensor, cached_features: bool) -> Tensor:
        features_NPD: Tensor = self.projector(inputs if cached_features else self.vision_tower(inputs))
        return features_NPD


def _per_tile(model: SymphonyVLMForConditionalGeneration, cached_features: bool) -> float:
    """Of tower and projector, counted in a pass over one square without data, which is right for any architecture."""
    with torch.device("meta"):
        front = _Front(model)
        size = model.vision_tower.config.input_size
        inputs = torch.empty(1, 3, size, size)
        if cached_features:
            inputs = torch.empty(1, model.vision_tower.num_tokens, model.vision_tower.hidden_size)
    # Experts stand where dense layers stand in the new parts, which cannot be routed without data: their cost is that
    # of the dense layer times the weights that are active.
    sparse = {name: layer for name, layer in sparse_layers(model) if name.startswith(("vision_tower", "projector"))}
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, parameter in front.named_parameters():
        owner = next((layer for prefix, layer in sparse.items() if name.startswith(prefix)), None)
        parameter.requires_grad_(owner.experts.down_proj.requires_grad if owner is not None else trains[name])
    counter = _count(front, inputs, cached_features)
    total = float(counter.get_total_flops())
    by_module = counter.get_flop_counts()
    for name, layer in sparse.items():
        dense = sum(p.numel() for p in front.get_submodule(name).parameters() if p.dim() > 1)
        total += (_active_weights(layer) / dense - 1) * sum(by_module.get(f"{_Front.__name__}.{name}", {}).values())
    return total


def _active_weights(layer: SparseMoE) -> float:
    """Weights of matrices that a token meets."""
    experts = sum(p.numel() for p in layer.experts.parameters() if p.dim() > 2)
    others = [*layer.router.gate.parameters()]
    others += [] if layer.shared_expert is None else [*layer.shared_expert.parameters()]
    share = layer.router.config.num_experts_per_tok / layer.experts.num_experts
    return share * experts + sum(p.numel() for p in others if p.dim() > 1)


def _per_pair_of_image_and_caption(model: ContrastiveModel) -> float:
    """Of both encoders; the similarities of all pairs, which grow with the square of the batch, are small."""
    from open_clip import CLIP

    with torch.device("meta"):
        clip = CLIP(**model.architecture)
        side = clip.visual.image_size
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        images = torch.empty(1, 3, height, width)
        captions = torch.zeros(1, model.context_length, dtype=torch.long)
    for (_, mine), (_, real) in zip(clip.named_parameters(), model.clip.named_parameters(), strict=True):
        mine.requires_grad_(real.requires_grad)
    return float(_count(clip, images, captions).get_total_flops())


def _count(module: nn.Module, *inputs: Any) -> FlopCounterMode:
    counter = FlopCounterMode(display=False)
    with counter:
        output = module(*inputs)
        parts = output if isinstance(output, tuple) else (output,)
        total = torch.stack([part.sum() for part in parts if isinstance(part, Tensor)]).sum()
        if total.requires_grad:
            total.backward()
    return counter


PEAKS = (
    ("B200", 2250, 1125, 80),
    ("GH200", 990, 495, 67),
    ("H200 NVL", 836, 418, 60),
    ("H200", 989, 495, 67),
    ("H100 NVL", 836, 418, 60),
    ("H100 PCIe", 756, 378, 51),
    ("H100", 989, 495, 67),
    ("H800 PCIe", 756, 378, 51),
    ("H800", 989, 495, 67),
    ("A100", 312, 156, 19.5),
    ("A800", 312, 156, 19.5),
    ("L40S", 362, 183, 91.6),
    ("L40", 181, 90.5, 90.5),
    ("L4", 121, 60, 30.3),
    ("RTX A6000", 155, 77.4, 38.7),
    ("A10G", 70, 35, 31.2),
    ("A10", 125, 62.5, 31.2),
    ("RTX 5090", 209.5, 104.8, 104.8),
    ("RTX 4090", 165.2, 82.6, 82.6),
    ("RTX 3090", 71, 35.6, 35.6),
)
"""Parts of a GPU's name, the first that fits counts; TFLOP/s of dense products in bf16 (summed in fp32), in TF32, and
in fp32 proper. From NVIDIA's data sheets, whose figures with sparsity are twice as high."""


def peak_tflops(device_name: str, *, bf16: bool, tf32: bool = False) -> float | None:
    """Arithmetic peak of a GPU, None if it is not known.

    Args:
        device_name: as `torch.cuda.get_device_name` tells it.
        bf16: whether matrices are multiplied in 16 bits.
        tf32: whether those of 32 bits are multiplied in TF32.
    """
    for part, half, tensor_float, single in PEAKS:
        if part in device_name:
            return float(half if bf16 else tensor_float if tf32 else single)
    return None
