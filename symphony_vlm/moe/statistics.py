"""Routing statistics, accumulated on the device and read only when somebody asks.

Shape letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from symphony_vlm.moe.expert_graph import expert_graphs
from symphony_vlm.moe.router import RouterOutput

__all__ = ["LoadStatistics", "graph_statistics"]


class LoadStatistics:
    """Load, gate and entropy sums per layer since the last `read`. Adding never synchronises with the host."""

    def __init__(self) -> None:
        self._sums: dict[int, dict[str, Tensor]] = {}

    @torch.no_grad()
    def add(self, layer: int, output: RouterOutput, token_mask_T: Tensor | None) -> None:
        """Adds one forward pass of one layer; padding (mask False) does not count."""
        probs_TE = output.logits_TE.softmax(-1)
        mask_T = probs_TE.new_ones(len(probs_TE)) if token_mask_T is None else token_mask_T.float()
        slots_TE = torch.zeros_like(probs_TE).scatter_(-1, output.indices_TK, 1.0)
        entropy_T = -(probs_TE * probs_TE.clamp(min=1e-12).log()).sum(-1)
        new = {
            "load_E": (slots_TE * mask_T[:, None]).sum(0),
            "gate_E": (probs_TE * mask_T[:, None]).sum(0),
            "entropy": (entropy_T * mask_T).sum(),
            "tokens": mask_T.sum(),
        }
        old = self._sums.get(layer)
        self._sums[layer] = new if old is None else {key: old[key] + new[key] for key in new}

    def read(self) -> dict[int, dict[str, object]]:
        """The statistics by layer, then starts afresh.

        Each layer: ``load`` (share of the selected slots per expert), ``load_cv`` (its coefficient of variation),
        ``gate_entropy`` (entropy of the mean gate, nats), ``token_entropy`` (mean entropy per token, nats), ``tokens``.
        """
        result: dict[int, dict[str, object]] = {}
        for layer, sums in self._sums.items():
            tokens = float(sums["tokens"])
            if tokens == 0:
                continue
            load_E = sums["load_E"] / sums["load_E"].sum()
            gate_E = sums["gate_E"] / tokens
            result[layer] = {
                "load": [round(x, 6) for x in load_E.tolist()],
                "load_cv": float(load_E.std(correction=0) / load_E.mean()),
                "gate_entropy": float(-(gate_E * gate_E.clamp(min=1e-12).log()).sum()),
                "token_entropy": float(sums["entropy"]) / tokens,
                "tokens": int(tokens),
            }
        self._sums = {}
        return result


@torch.no_grad()
def graph_statistics(model: nn.Module, *, num_edges: int = 3) -> dict[str, dict[str, object]]:
    """State of every expert graph by module name.

    Each: ``adjacency`` (nested lists), ``self_weight`` (mean diagonal), ``spectral_gap`` (1 - second largest absolute
    eigenvalue, over the largest), ``top_edges`` (from, to, weight), ``num_updates``.
    """
    result: dict[str, dict[str, object]] = {}
    for name, graph in expert_graphs(model):
        adjacency_EE = graph.adjacency_EE.cpu()
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
