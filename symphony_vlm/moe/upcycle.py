"""Turns dense feed-forward layers into mixtures of experts (sparse upcycling, arXiv 2212.05055).

A layer that is copied E times and routed with weights that add up to 1 computes what it computed before. So do the two
options: with a *shared expert* the routed half and the shared half are each the layer, weighted 1/2; with *split
experts* a copy's n slices add up to the layer, the rows of the gate of one copy start equal, so that the top K contain
whole copies (the virtual groups of arXiv 2410.07524), and each slice is scaled by n because its weight is 1/n of the
copy's. These factors are multiplied into the experts' last weights; the forward pass knows nothing of them.

Shape letters: D input size, F hidden size of the dense layer, O output size, E experts, n slices (``expert_split``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from symphony_vlm.errors import InputError
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.feed_forward import FeedForward, is_native_moe, placements, recognise
from symphony_vlm.moe.gate import CosineGate, LinearGate
from symphony_vlm.moe.installation import expert_sizes, finish_installation_, layer_from_dense
from symphony_vlm.moe.layer import SparseMoE
from symphony_vlm.moe.proof import MAX_LOGIT_DIFFERENCE, logits_of_probe, prove_equal
from symphony_vlm.moe.recording import RoutingRecorder, sparse_layers
from symphony_vlm.moe.token_graph import show_probabilities_

__all__ = ["MAX_LOGIT_DIFFERENCE", "check_dense", "fill_", "is_exact", "upcycle_"]


@torch.no_grad()
def upcycle_(model: PreTrainedModel, config: MoEConfig, *, seed: int = 0) -> RoutingRecorder:
    """Upcycles a dense model in place and proves that its function has not changed.

    Every selected feed-forward layer is copied into E experts, with optional noise; the gate is new, N(0, 0.02),
    seeded by (seed, layer). Where the settings make this exact (`is_exact`), logits before and after must agree to
    `MAX_LOGIT_DIFFERENCE` in fp32.

    Args:
        model: a causal LM; or a vision-language model, whose ``modules`` can all get experts.
        config: the settings.
        seed: of gates and noise.

    Returns:
        The recorder of router outputs, also left at ``model.routing``.

    Raises:
        InputError: a layer cannot be upcycled; the model is as it was.
        RuntimeError: the logits changed; the model is left upcycled for inspection.
    """
    check_dense(model, config)
    show_probabilities_(getattr(model, "language_model", model), config)
    before = logits_of_probe(model)
    for place in placements(model, config):
        sparse = layer_from_dense(place, config)
        fill_(sparse, recognise(place.mlp, place.label), config, seed)
        place.replace(sparse)  # frees the dense layer before the next one is copied
    recorder = finish_installation_(model, config)
    if is_exact(config) and before.dtype == torch.float32:
        prove_equal(before, logits_of_probe(model), "upcycling")
    return recorder


def is_exact(config: MoEConfig) -> bool:
    """Whether upcycling with these settings leaves the function as it was."""
    return config.expert_init_noise == 0 and config.renormalize


def check_dense(model: PreTrainedModel, config: MoEConfig) -> None:
    """Finds out whether every chosen layer can be upcycled, before any of them is touched.

    Raises:
        InputError: one cannot, or the model has sparse layers.
    """
    if any(True for _ in sparse_layers(model)):
        raise InputError("the model already has sparse layers", where="upcycle", remedy="Start from a dense model.")
    for place in placements(model, config):
        if is_native_moe(place.mlp):
            raise InputError(
                f"{place.label} is a mixture of experts already ({type(place.mlp).__name__})",
                where="upcycle",
                remedy="Take over its routers with symphony_vlm.symphonize_(model).",
            )
        expert_sizes(place, config)


@torch.no_grad()
def fill_(sparse: SparseMoE, dense: FeedForward, config: MoEConfig, seed: int) -> None:
    """Gives a new sparse layer its weights: a fresh gate, copies (or slices of copies) of the dense layer."""
    sparse.reset_routing(seed)
    experts, n = sparse.experts, config.expert_split
    if n > 1:
        _tie_rows_of_a_copy_(sparse, n)
    halves = 2 if dense.gated else 1
    share = 0.5 if config.shared_expert else 1.0
    generator = sparse.generator(seed, "experts")
    # Slice s of the hidden values: of the gate's half and of the other half, and the columns that read them.
    ups = dense.up_weight.unflatten(0, (halves, n, -1)).transpose(0, 1).flatten(1, 2)
    downs = n * share * dense.down.weight.unflatten(1, (n, -1)).transpose(0, 1)
    _copy_to_experts(experts.up_weight, ups, config.expert_init_noise, generator)
    _copy_to_experts(experts.down_proj, downs, config.expert_init_noise, generator)
    if experts.has_bias:
        up_biases = dense.up_bias.unflatten(0, (halves, n, -1)).transpose(0, 1).flatten(1, 2)
        _copy_to_experts(experts.up_bias, up_biases, 0.0, generator)
        # All slices' weights add up to 1, so each carries the whole.
        _copy_to_experts(experts.down_proj_bias, share * dense.down.bias.expand(n, -1), 0.0, generator)


def _copy_to_experts(stacked: Tensor, slices: Tensor, noise: float, generator: torch.Generator) -> None:
    """Expert e becomes slice e mod n of the dense layer, plus noise relative to the weights' standard deviation."""
    stacked.unflatten(0, (-1, len(slices))).copy_(slices)
    if noise > 0:
        width = noise * slices.float().std()
        for expert in stacked:
            draw = torch.randn(expert.shape, generator=generator, dtype=torch.float32, device="cpu")
            expert += (width * draw.to(expert.device)).to(expert.dtype)


def _tie_rows_of_a_copy_(sparse: SparseMoE, n: int) -> None:
    gate: Any = sparse.router.gate
    rows = gate.weight if isinstance(gate, LinearGate) else gate.embeddings if isinstance(gate, CosineGate) else None
    if rows is None:
        raise InputError(
            f"{type(gate).__name__} has no row per expert that could start equal for the slices of a copy",
            where="moe.expert_split",
            remedy="Use the linear or the cosine gate, or expert_split: 1.",
        )
    rows.copy_(rows[::n].repeat_interleave(n, dim=0))
