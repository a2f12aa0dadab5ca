"""Routing statistics, accumulated on the device and read only when somebody asks.

Shape letters: T tokens, E experts, K experts per token, P numbers of one expert in one parameter.

No statistic of dropped tokens: experts have no capacity limit, so none is ever dropped.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from symphony_vlm.moe.expert_graph import expert_graphs
from symphony_vlm.moe.router import RouterOutput

__all__ = ["GraphDrift", "LoadStatistics", "expert_distance", "graph_statistics", "sum_over_processes"]

Key = TypeVar("Key")


class LoadStatistics:
    """Load, gate and entropy sums per layer since the last `read`. Adding never synchronises with the host.

    Several readers can have intervals of their own, each under a name.
    """

    def __init__(self) -> None:
        # By reader, what was taken off the device since its last call.
        self._pending: dict[str, dict[int | str, Tensor]] = {}
        # By layer: load [E], gate [E], entropy, tokens, one after the other.
        self._sums: dict[int | str, Tensor] = {}

    @torch.no_grad()
    def add(self, layer: int | str, output: RouterOutput, token_mask_T: Tensor | None) -> None:
        """Adds one forward pass of one layer; padding (mask False) does not count."""
        log_probs_TE = output.logits_TE.log_softmax(-1)
        probs_TE = log_probs_TE.exp()
        slots_TE = torch.zeros_like(probs_TE).scatter_(-1, output.indices_TK, 1.0)
        entropy_T = -(probs_TE * log_probs_TE).sum(-1)
        facts = torch.cat([slots_TE, probs_TE, entropy_T[:, None], torch.ones_like(entropy_T)[:, None]], dim=-1)
        new = facts.sum(0) if token_mask_T is None else token_mask_T.to(facts.dtype) @ facts
        self._sums[layer] = self._sums[layer] + new if layer in self._sums else new

    def read(self, reader: str = "log") -> dict[int | str, dict[str, object]]:
        """The statistics by layer, of all data-parallel processes together (so every one must call), and a fresh start.

        Args:
            reader: whose interval ends. That of a new one has begun with the first pass that nobody has read.

        Each layer: ``load`` (share of the selected slots per expert), ``load_cv`` (its coefficient of variation),
        ``gate_entropy`` (entropy of the mean gate, nats), ``token_entropy`` (mean entropy per token, nats), ``tokens``.
        Entropies are those of the softmax of the gate's logits, before any graph.
        """
        self._pending.setdefault(reader, {})
        for layer, values in self._sums.items():
            new = values.cpu().double()
            for held in self._pending.values():
                held[layer] = held[layer] + new if layer in held else new
        self._sums = {}
        sums, self._pending[reader] = self._pending[reader], {}
        result: dict[int | str, dict[str, object]] = {}
        for layer, values in sum_over_processes(sums).items():
            load_E, gate_E, (entropy, tokens) = values.split([(len(values) - 2) // 2] * 2 + [2])
            if tokens == 0:
                continue
            load_E, gate_E = load_E / load_E.sum(), gate_E / tokens
            result[layer] = {
                "load": [round(x, 6) for x in load_E.tolist()],
                "load_cv": float(load_E.std(correction=0) / load_E.mean()),
                "gate_entropy": float(-torch.xlogy(gate_E, gate_E).sum()),
                "token_entropy": float(entropy / tokens),
                "tokens": int(tokens),
            }
        return result


def sum_over_processes(sums: dict[Key, Tensor]) -> dict[Key, Tensor]:
    """Sums by layer or other name, in the order of the ranks. A process may lack some: it had no batch, or no image."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return sums
    parts: list[dict[Key, Tensor]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, sums)
    layers = dict.fromkeys(layer for part in parts for layer in part)
    return {layer: torch.stack([part[layer] for part in parts if layer in part]).sum(0) for layer in layers}


class GraphDrift:
    """How far the expert graphs move: the mean of ||A_t - A_{t-1}||_F over the steps since the last `read`.

    `step` is called once per optimizer step, after the graphs have moved, on every rank (`whole_adjacency`); it never
    synchronises with the host.
    """

    def __init__(self, model: nn.Module) -> None:
        self._graphs = dict(expert_graphs(model))
        self._before = {name: graph.whole_adjacency().clone() for name, graph in self._graphs.items()}
        self._sums: dict[str, Tensor] = {}
        self._num_steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """Adds the way since the last call."""
        for name, graph in self._graphs.items():
            now_EE = graph.whole_adjacency().clone()
            length = (now_EE - self._before[name]).norm()
            self._sums[name] = self._sums[name] + length if name in self._sums else length
            self._before[name] = now_EE
        self._num_steps += 1

    def read(self) -> dict[str, float]:
        """Mean step length by module name, as in `graph_statistics`; empty without a step. Then starts afresh."""
        result = {name: float(total) / self._num_steps for name, total in self._sums.items()}
        self._sums, self._num_steps = {}, 0
        return result


@torch.no_grad()
def graph_statistics(model: nn.Module, *, num_edges: int = 3) -> dict[str, dict[str, object]]:
    """State of every expert graph by module name. To be called on every rank (`ExpertGraph.whole_adjacency`).

    Each: ``adjacency`` (nested lists), ``self_weight`` (mean diagonal), ``spectral_gap`` (1 - second largest absolute
    eigenvalue, over the largest), ``top_edges`` (receiving expert, giving expert, weight), ``num_updates``.
    """
    result: dict[str, dict[str, object]] = {}
    for name, graph in expert_graphs(model):
        adjacency_EE = graph.whole_adjacency().cpu()
        eigenvalues = torch.linalg.eigvals(adjacency_EE).abs().sort(descending=True).values
        gap = 1 - float(eigenvalues[1] / eigenvalues[0]) if len(eigenvalues) > 1 else 1.0
        off_EE = adjacency_EE - torch.diag(adjacency_EE.diagonal())
        top = off_EE.flatten().topk(min(num_edges, off_EE.numel()))
        num_experts = len(adjacency_EE)
        result[name] = {
            "adjacency": [[round(x, 6) for x in row] for row in adjacency_EE.tolist()],
            "self_weight": float(adjacency_EE.diagonal().mean()),
            "spectral_gap": gap,
            "top_edges": [
                (int(i) // num_experts, int(i) % num_experts, round(float(w), 6))
                for w, i in zip(top.values, top.indices, strict=True)
                if w > 0
            ],
            "num_updates": int(graph.num_updates),
        }
    return result


@torch.no_grad()
def expert_distance(experts: nn.Module) -> float:
    """How far a layer's experts are apart: the root mean square of ||W_i - W_j|| over pairs, over that of ||W_i||.

    W is all weights of one expert. 0: copies, as upcycling makes them; near 1.41: nothing in common.

    Args:
        experts: with stacked parameters, ``[E, ...]`` each.
    """
    apart = size = 0.0
    for parameter in experts.parameters():
        weights_EP = parameter.flatten(1).float()
        num_experts = len(weights_EP)
        # Of all ordered pairs sum ||W_i - W_j||^2 is 2 E sum ||W_i - mean||^2, without a difference of large sums.
        centred_EP = weights_EP - weights_EP.mean(0)
        apart += 2 * num_experts * float(centred_EP.square().sum())
        size += float(weights_EP.square().sum())
    if num_experts == 1 or size == 0.0:
        return 0.0
    return math.sqrt(apart / (num_experts - 1) / size)
