"""What the routers do while a stage trains: for the terminal and the log, and warnings when one has collapsed.

E experts, K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from symphony_vlm.config.monitor import MonitorConfig
from symphony_vlm.moe.layer import SparseMoE
from symphony_vlm.moe.recording import RoutingRecorder, sparse_layers
from symphony_vlm.training.stage_warnings import StageWarnings

__all__ = ["LayerRouting", "RouterWatch", "collapse_threshold"]

EXPECTED_TOKENS = 20
"""Routers are judged by intervals in which an expert sees so many tokens at an even load: by chance alone it then has
none in one of e^20 cases."""


@dataclass(frozen=True, kw_only=True)
class LayerRouting:
    """A layer since the last log step."""

    name: str
    """As in error messages: ``decoder layer 3``."""
    shares: tuple[float, ...]
    """By expert, the share of the tokens that chose it; they add up to K, and an even load is K / E."""
    entropy: float
    """Of the mean gate, over ln E: 1 if the gate likes all experts equally in the mean."""
    is_collapsed: bool
    drift: float | None = None
    """How far the expert graph has moved a step, ||A_t - A_(t-n)||_F / n; None without a graph."""
    edge: tuple[int, int, float] | None = None
    """The heaviest edge: receiving expert, giving expert, weight."""

    @property
    def largest(self) -> float:
        """Share of the expert that most tokens chose."""
        return max(self.shares)


def collapse_threshold(setting: float, num_experts: int, num_chosen: int) -> float:
    """Share of tokens on one expert above which a router counts as collapsed.

    An even load is K / E, and 1 is the most there can be: every token chooses an expert at most once. Where K / E is
    itself close to the setting, the middle between it and 1 is still far from even.
    """
    return max(setting, (1 + num_chosen / num_experts) / 2)


class RouterWatch(TrainerCallback):
    """Reads load statistics and expert graphs at log steps; `latest` and `log_entries` are what it has found.

    Args:
        model: whose sparse layers it names.
        recorder: of the model.
        config: thresholds.
        warnings: get those about collapsed routers and dead experts.
    """

    def __init__(
        self, model: nn.Module, recorder: RoutingRecorder, config: MonitorConfig, warnings: StageWarnings
    ) -> None:
        self._layers: dict[int | str, tuple[str, SparseMoE]] = {
            layer.key: (name, layer) for name, layer in sparse_layers(model)
        }
        self._recorder = recorder
        self._config = config
        self._warnings = warnings
        self.latest: list[LayerRouting] = []
        """By layer; of layers that had tokens."""
        self._graphs: dict[int | str, Tensor] = {}
        self._step = 0
        # By layer, since how many steps its router has been collapsed.
        self._collapsed: dict[str, int] = {}
        # By layer, since how many steps each expert has had no token, and how many tokens there were.
        self._idle: dict[str, tuple[list[int], list[int]]] = {}

    @property
    def log_entries(self) -> dict[str, float]:
        """Fields of a line of the log."""
        if not self.latest:
            return {}
        entries = {
            "router/largest_share": max(layer.largest for layer in self.latest),
            "router/entropy_min": min(layer.entropy for layer in self.latest),
        }
        drifts = [layer.drift for layer in self.latest if layer.drift is not None]
        if drifts:
            entries["router/drift"] = sum(drifts) / len(drifts)
        return {name: round(value, 6) for name, value in entries.items()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._recorder.statistics.read("watch")
        self._graphs = {key: graph.clone() for key, graph in self._adjacencies().items()}
        self._step = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The Trainer's own callback, the first in line, has already decided.
        if not control.should_log:
            return
        found = self._recorder.statistics.read("watch")
        graphs = self._adjacencies()
        steps = max(1, state.global_step - self._step)
        self.latest = []
        for key, (path, layer) in self._layers.items():
            if key in found:
                routing = self._routing(layer, found[key], graphs.get(key), self._graphs.get(key), steps)
                self.latest.append(routing)
                self._warn(path, layer, routing, int(found[key]["tokens"]), steps, state.global_step)  # type: ignore[call-overload]
        self._graphs, self._step = {key: graph.clone() for key, graph in graphs.items()}, state.global_step

    @torch.no_grad()
    def _adjacencies(self) -> dict[int | str, Tensor]:
        graphs = {key: layer.router.expert_graph for key, (_, layer) in self._layers.items()}
        return {key: graph.whole_adjacency().cpu() for key, graph in graphs.items() if graph is not None}

    def _routing(
        self, layer: SparseMoE, found: dict[str, Any], graph_EE: Tensor | None, before_EE: Tensor | None, steps: int
    ) -> LayerRouting:
        num_chosen, num_experts = layer.router.config.num_experts_per_tok, layer.router.config.num_experts
        shares = tuple(min(1.0, share * num_chosen) for share in found["load"])
        drift = edge = None
        if graph_EE is not None and before_EE is not None and num_experts > 1:
            drift = float((graph_EE - before_EE).norm()) / steps
            off_EE = graph_EE - torch.diag(graph_EE.diagonal())
            weight, place = off_EE.flatten().max(0)
            edge = (int(place) // num_experts, int(place) % num_experts, float(weight)) if weight > 0 else None
        return LayerRouting(
            name=layer.router.layer_name,
            shares=shares,
            entropy=found["gate_entropy"] / math.log(num_experts) if num_experts > 1 else 1.0,
            is_collapsed=found["tokens"] >= _enough_tokens(layer)
            and max(shares) > collapse_threshold(self._config.collapse_share, num_experts, num_chosen),
            drift=drift,
            edge=edge,
        )

    def _warn(self, path: str, layer: SparseMoE, routing: LayerRouting, tokens: int, steps: int, step: int) -> None:
        name = routing.name
        lasted = self._collapsed[name] = self._collapsed.get(name, 0) + steps if routing.is_collapsed else 0
        if lasted >= self._config.collapse_steps:
            expert = routing.shares.index(routing.largest)
            even = layer.router.config.num_experts_per_tok / layer.router.config.num_experts
            message = (
                f"{name}: the router has collapsed: {routing.largest:.1%} of its tokens have chosen expert {expert} "
                f"for {lasted} steps (an even load is {even:.0%})."
            )
            self._warnings.give(
                "collapsed_router", step, message, _remedy(path, layer), layer=name, share=round(routing.largest, 6)
            )
        dead = self._dead(routing, layer, tokens, steps)
        if dead:
            experts = f"expert{'s' * (len(dead) > 1)} {', '.join(map(str, dead))}"
            message = f"{name}: no token has chosen {experts} for {self._config.dead_steps} steps or more."
            self._warnings.give("dead_experts", step, message, _remedy(path, layer), layer=name, experts=dead)

    def _dead(self, routing: LayerRouting, layer: SparseMoE, tokens: int, steps: int) -> list[int]:
        num_experts = len(routing.shares)
        idle, seen = self._idle.setdefault(routing.name, ([0] * num_experts, [0] * num_experts))
        for expert, share in enumerate(routing.shares):
            idle[expert] = 0 if share else idle[expert] + steps
            seen[expert] = 0 if share else seen[expert] + tokens
        enough = _enough_tokens(layer)
        return [e for e in range(num_experts) if idle[e] >= self._config.dead_steps and seen[e] >= enough]


def _enough_tokens(layer: SparseMoE) -> float:
    return EXPECTED_TOKENS * layer.router.config.num_experts / layer.router.config.num_experts_per_tok


def _remedy(path: str, layer: SparseMoE) -> str:
    config = layer.router.config
    if not layer.router.is_trained:
        return f"The router is frozen in this stage; give it a learning rate (train: {{{path}.router: ...}})."
    ways = [
        f"a larger model.moe.balance_loss_weight (now {config.balance_loss_weight:g})",
        f"a lower rate for the router (train: {{{path}.router: ...}})",
        f"more model.moe.jitter_noise (now {config.jitter_noise:g})",
    ]
    if config.expert_graph == "symphony":
        ways.append(f"a weaker graph, model.moe.strength (now {config.strength:g})")
    return f"Try {', '.join(ways[:-1])}, or {ways[-1]}."
