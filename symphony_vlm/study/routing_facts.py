"""What the routers of an arm did, read from the logs of its training: load, entropy, and the expert graphs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

__all__ = ["concentration", "final_routing", "off_diagonal_mass", "routing_log"]

DEAD = 0.1
"""An expert with less than a tenth of an equal share of the tokens counts as dead."""


def routing_log(run: Path) -> list[dict[str, Any]]:
    """Entries of all stages of a run, ``step`` counted on from stage to stage; empty for a dense model."""
    entries: list[dict[str, Any]] = []
    for path in sorted(run.glob("*/routing.jsonl")):
        before = entries[-1]["step"] if entries else 0
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        entries += [entry | {"step": before + entry["step"]} for entry in found]
    return entries


def final_routing(runs: Sequence[Path]) -> dict[str, float | None]:
    """Means over runs and layers, from the last record of training on: since the record before.

    Returns:
        ``experts`` and ``dead_experts`` (all layers together), ``load_cv`` (coefficient of variation of the experts'
        shares), ``token_entropy`` (nats), ``off_diagonal_mass`` and ``concentration`` of the graphs; None where there
        is nothing of the kind.
    """
    last = [log[-1] for log in map(routing_log, runs) if log]
    layers = [list(entry["layers"].values()) for entry in last]
    graphs = [np.asarray(graph["adjacency"]) for entry in last for graph in entry.get("graphs", {}).values()]
    every = [layer for found in layers for layer in found]
    return {
        "experts": _mean([sum(len(layer["load"]) for layer in found) for found in layers]),
        "dead_experts": _mean([sum(map(_dead, found)) for found in layers]),
        "load_cv": _mean([layer["load_cv"] for layer in every]),
        "token_entropy": _mean([layer["token_entropy"] for layer in every]),
        "off_diagonal_mass": _mean([off_diagonal_mass(graph) for graph in graphs]),
        "concentration": _mean([concentration(graph) for graph in graphs]),
    }


def off_diagonal_mass(adjacency: np.ndarray) -> float:
    """How much an expert listens to the others on average: 0 for the identity, near `strength` after long training."""
    return float((adjacency.sum() - np.trace(adjacency)) / len(adjacency))


def concentration(adjacency: np.ndarray) -> float:
    """1 - entropy of the weights between different experts over its largest value: 0 if all are equal, 1 for one edge.

    A graph without such weights (the identity) concentrates nothing: 0.
    """
    weights = adjacency[~np.eye(len(adjacency), dtype=bool)]
    if len(weights) < 2 or weights.sum() <= 0:
        return 0.0
    shares = weights[weights > 0] / weights.sum()
    return float(1 + (shares * np.log(shares)).sum() / math.log(len(weights)))


def _dead(layer: Mapping[str, Any]) -> int:
    return sum(share < DEAD / len(layer["load"]) for share in layer["load"])


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None
