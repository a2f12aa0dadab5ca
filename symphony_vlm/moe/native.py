"""Takes over the routers of transformers' own mixtures of experts, and calibrates expert graphs after the fact.

Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE (and whatever is built of the same parts) choose with a linear gate, softmax and
top-K. Here the trained gate, the experts and a shared expert stay what they are, and our router takes the decision: the
same one, as long as its expert graph is the identity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from symphony_vlm.errors import InputError
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import SymphonyGraph, expert_graphs, update_expert_graphs
from symphony_vlm.moe.feed_forward import is_native_moe, layers_with_mlp
from symphony_vlm.moe.installation import install_moe_
from symphony_vlm.moe.proof import logits_of_probe, prove_equal
from symphony_vlm.moe.recording import RoutingRecorder, sparse_layers
from symphony_vlm.moe.token_graph import show_probabilities_

__all__ = ["calibrate_expert_graphs_", "symphonize_"]


@torch.no_grad()
def symphonize_(model: PreTrainedModel, config: MoEConfig | None = None) -> RoutingRecorder:
    """Puts our routers into a mixture of experts of transformers, in place, and proves that its logits are the same.

    Graph updates, records, losses and statistics then work as for an upcycled model; the router losses are ours, and
    the class's own (``output_router_logits``) is switched off.

    Args:
        model: a causal LM with sparse layers, or a vision-language model around one.
        config: the settings; default: ``symphony_smoe``. The number of experts, K, whether weights are renormalised,
            jitter and the shared expert are the model's own and overrule it.

    Returns:
        The recorder of router outputs, also left at ``model.routing``.

    Raises:
        InputError: the model has no such layers, or a setting would change its function from the start.
        RuntimeError: the logits changed in fp32; the model is left converted for inspection.
    """
    language_model: Any = getattr(model, "moe_modules", {"language": model})["language"]
    layers = layers_with_mlp(language_model)
    native = [index for index, layer in enumerate(layers) if is_native_moe(layer.mlp)]
    if not native or any(True for _ in sparse_layers(model)):
        raise InputError(
            f"{type(language_model).__name__} has no sparse layers of transformers to take over",
            where="symphonize",
            remedy="Use upcycle_ for a dense model.",
        )
    for index in native:
        _check_parts(layers[index].mlp, index)
    config = _own_settings(config or MoEConfig(), layers[native[0]].mlp)
    chosen = native if config.layers == "all" else [i for i in config.sparse_layers(len(layers)) if i in native]
    config = dataclasses.replace(config, layers=tuple(chosen))

    show_probabilities_(model, config)
    before = logits_of_probe(model)
    recorder = install_moe_(model, config)
    if before.dtype == torch.float32:
        prove_equal(before, logits_of_probe(model), "taking over the routers")
    return recorder


def _check_parts(block: Any, layer: int) -> None:
    """Refuses a sparse layer with parts that our router or experts would leave out."""
    known = {"gate", "experts", "shared_expert", "shared_expert_gate"}
    gate, experts = block.gate, block.experts
    extra = sorted({name for name, _ in block.named_children()} - known)
    extra += [f"gate.{name}" for name in gate.state_dict() if name != "weight"]
    extra += [f"experts.{name}" for name in experts.state_dict() if name not in ("gate_up_proj", "down_proj")]
    if extra or not hasattr(gate, "top_k") or getattr(experts, "is_transposed", False):
        raise InputError(
            f"decoder layer {layer} is a {type(block).__name__} with {', '.join(extra) or 'another layout'}, which "
            "this router does not know",
            where="symphonize",
            remedy="Supported: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE and layers of the same parts.",
        )


def _own_settings(config: MoEConfig, block: Any) -> MoEConfig:
    """The settings with the model's own facts in them.

    Raises:
        InputError: a setting asks for something else than the trained routers and experts.
    """
    start = {"gate": "linear", "token_graph": "none", "score": "softmax", "expert_split": 1, "expert_init_noise": 0.0}
    start |= {"modules": ("language",)}
    wrong = {name: getattr(config, name) for name, value in start.items() if getattr(config, name) != value}
    if config.expert_graph == "learnable":
        wrong["expert_graph"] = "learnable"  # begins near the identity, not at it
    for name, value in wrong.items():
        raise InputError(
            f"{value!r} would not leave a trained mixture of experts as it is",
            where=f"moe.{name}",
            remedy=f"Use {start[name]!r}." if name in start else "Use symphony, fixed or none.",
        )
    return dataclasses.replace(
        config,
        num_experts=block.gate.weight.shape[0],
        num_experts_per_tok=block.gate.top_k,
        # Mixtral has no such switch and always renormalises.
        renormalize=bool(getattr(block.gate, "norm_topk_prob", True)),
        jitter_noise=float(getattr(block, "jitter_noise", config.jitter_noise)),
        shared_expert=hasattr(block, "shared_expert"),
    )


@torch.no_grad()
def calibrate_expert_graphs_(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> None:
    """Sets the expert graphs to the co-selections that data brings about; trains nothing, changes no weight.

    This is Symphony after the fact: with ``active: eval`` (or any setting) a trained plain mixture of experts gets its
    graph from a pass over data. The plain routers choose while it is counted, so calibrating twice gives the same.

    Args:
        model: with sparse layers, on every rank of a distributed run; counts are summed over ranks.
        batches: arguments of the model's forward pass, on its device.

    Raises:
        InputError: the model has no graph that is counted, or there was no batch.
    """
    graphs = [graph for _, graph in expert_graphs(model) if isinstance(graph, SymphonyGraph)]
    recorder: RoutingRecorder | None = getattr(model, "routing", None)
    if not graphs or recorder is None:
        raise InputError(
            f"{type(model).__name__} has no expert graph that is counted",
            where="calibrate_expert_graphs_",
            remedy="Use upcycle_ or symphonize_ with expert_graph: symphony first.",
        )
    for graph in graphs:
        graph.take_counts()
        graph.adjacency_EE.copy_(torch.eye(len(graph.adjacency_EE)))
        graph.num_updates.zero_()
    was_training = model.training
    model.eval()
    num_batches = 0
    with recorder.collect():
        for batch in batches:
            model(**batch)
            num_batches += 1
    model.train(was_training)
    if num_batches == 0:
        raise InputError("no batch to count", where="calibrate_expert_graphs_", remedy="Give at least one.")
    update_expert_graphs(model, momentum=0.0)
