"""What the cells of one arm scored: sums and weights of every cluster, by seed and condition.

A mean is a sum of sums over a sum of weights: nats over words of stretches of text, right answers over questions about
pictures. Everything else (intervals, comparisons) is the same for both.

Shape letters: S seeds, G clusters (pictures, or stretches of text).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from symphony_vlm.errors import InputError

__all__ = ["ArmScores", "CellScores", "Floats"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class CellScores:
    """One arm and seed on one part of the data."""

    seed: int
    run: Path
    """The training run."""
    sums: Mapping[str, Mapping[str, tuple[float, float]]]
    """By condition and cluster: sum and weight."""
    predictions: str
    """What was answered or scored, item by item, as one text; its hash tells whether a repetition gave the same."""
    seconds: float | None = None
    drift: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """By modality, what `drift.read_drift` found; empty without routers or where it was not measured."""


class ArmScores:
    """One arm on one part of the data.

    Args:
        cells: a seed each.
        where: for messages.

    Raises:
        InputError: the seeds were asked about different clusters.
    """

    def __init__(self, cells: Sequence[CellScores], where: str) -> None:
        self.cells = list(cells)
        self.seeds = [cell.seed for cell in cells]
        self.conditions = list(cells[0].sums)
        self._clusters = sorted({name for clusters in cells[0].sums.values() for name in clusters})
        self._sums: dict[str, Floats] = {}
        self._weights: dict[str, Floats] = {}
        for condition in self.conditions:
            columns = [[cell.sums[condition].get(name, (0.0, 0.0)) for name in self._clusters] for cell in cells]
            both = np.asarray(columns, dtype=np.float64)
            known = all(set(cell.sums[condition]) <= set(self._clusters) for cell in cells)
            if not known or not (both[:, :, 1] == both[0, :, 1]).all():
                raise InputError(f"{condition}: its seeds were not asked the same questions", where=where)
            self._sums[condition], self._weights[condition] = both[:, :, 0], both[0, :, 1]

    @property
    def clusters(self) -> list[str]:
        """Names, in the order of G."""
        return self._clusters

    def sums(self, condition: str, seeds: Sequence[int] | None = None) -> Floats:
        """``[S, G]``, of all seeds or of these."""
        rows = [self.seeds.index(seed) for seed in (self.seeds if seeds is None else seeds)]
        return self._sums[condition][rows]

    def weights(self, condition: str) -> Floats:
        """``[G]``."""
        return self._weights[condition]

    def predictions_sha256(self) -> str:
        """Hash of every item's prediction, over all seeds."""
        digest = hashlib.sha256()
        for cell in self.cells:
            digest.update(f"seed {cell.seed}\n{cell.predictions}".encode())
        return digest.hexdigest()
