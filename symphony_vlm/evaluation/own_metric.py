"""Benchmark figures that are no means of item scores (MME's sums, F1, circular accuracy), resampled as they are.

Resampling images or swapping the labels of two models multiplies sums over images by weights; the benchmark's own rule
then combines the sums. That needs the items whole, so the data is loaded again.

Shape letters: G images, C cells, m terms of the metric, R resamples or draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from symphony_vlm.evaluation.cell_records import CLEAN, Cell
from symphony_vlm.evaluation.item import Outcome
from symphony_vlm.evaluation.metrics import Metric
from symphony_vlm.evaluation.quantities import Quantity, Resampling
from symphony_vlm.evaluation.statistics import Floats, bootstrap_weights

__all__ = ["OwnMetric", "SwapTests", "own_quantities", "swap_tests"]

_MAX_NUMBERS = 4_000_000
"""Numbers held at a time in a chunk of resamples."""


@dataclass(frozen=True, kw_only=True)
class OwnMetric:
    """A model's answers in every cell, and the rule that makes one figure of them."""

    name: str
    metrics: Callable[[Sequence[Outcome]], Sequence[Metric]]
    """The task's."""
    outcomes: Mapping[Cell, Mapping[str, Outcome]]
    """By cell and item; items that failed are not among them."""

    def restrict(self, items: set[str]) -> OwnMetric:
        """The same on fewer items."""
        kept = {
            cell: {name: outcome for name, outcome in outcomes.items() if name in items}
            for cell, outcomes in self.outcomes.items()
        }
        return replace(self, outcomes=kept)

    def metric(self) -> Metric:
        """The rule, for the items of the clean cell (which sub-tasks there are depends on the items)."""
        outcomes = self.outcomes.get(CLEAN) or next(iter(self.outcomes.values()))
        return next(m for m in self.metrics(list(outcomes.values())) if m.name == self.name)

    def value(self, cell: Cell) -> float | None:
        """The figure of a cell as a share of the best; None where its denominator is 0."""
        metric = self.metric()
        outcomes = list(self.outcomes[cell].values())
        found = float(metric.combine(metric.terms(outcomes).sum(0))) / metric.scale if outcomes else np.nan
        return found if np.isfinite(found) else None

    def image_sums(self, cells: Sequence[Cell]) -> dict[str, Floats]:
        """Sums of the terms by image, ``[C, m]`` each."""
        metric = self.metric()
        sums: dict[str, Floats] = {}
        for row, cell in enumerate(cells):
            outcomes = list(self.outcomes[cell].values())
            for outcome, terms_m in zip(outcomes, metric.terms(outcomes), strict=True):
                image = outcome.item.cluster or outcome.item.image_key
                sums.setdefault(image, np.zeros((len(cells), len(terms_m))))[row] += terms_m
        return sums


def own_quantities(
    models: Sequence[OwnMetric], cells: Sequence[Cell], resampling: Resampling
) -> list[dict[Cell, Quantity]]:
    """The figure of every cell of every model, all resampled with the same weights."""
    images, sums = _stacked(models, cells)
    combine = _shares(models[0])
    values = [combine(part_GCm.sum(0)) for part_GCm in sums]
    replicates: list[list[Floats]] = [[] for _ in models]
    for weights_RG in _chunks(
        bootstrap_weights(len(images), seed=resampling.seed, n_resamples=resampling.n_resamples), sums[0]
    ):
        for column, part_GCm in zip(replicates, sums, strict=True):
            column.append(combine(np.tensordot(weights_RG, part_GCm, axes=1)))
    quantities: list[dict[Cell, Quantity]] = []
    for value_C, column, part_GCm in zip(values, replicates, sums, strict=True):
        drawn_RC = np.concatenate(column)
        left_GC = combine(part_GCm.sum(0) - part_GCm) if resampling.interval == "bca" else None
        quantities.append(
            {
                cell: Quantity(value=None, reason="nothing to divide by")
                if not np.isfinite(value_C[k])
                else Quantity(
                    value=float(value_C[k]),
                    replicates=drawn_RC[:, k],
                    left_out=None if left_GC is None else left_GC[:, k],
                )
                for k, cell in enumerate(cells)
            }
        )
    return quantities


@dataclass(frozen=True, kw_only=True)
class SwapTests:
    """P-values of two models' own figures, by swapping their labels for whole images."""

    clean: float
    did: Mapping[Cell, float]
    primary: float | None
    """Of the mean over the headline cells."""


def swap_tests(
    a: OwnMetric, b: OwnMetric, cells: Sequence[Cell], headline: Sequence[Cell], resampling: Resampling
) -> SwapTests:
    """Recomputes both figures under random swaps of the labels A and B of whole images.

    Args:
        a: The baseline.
        b: The other model, on the same items.
        cells: The clean cell first.
        headline: Cells of the primary hypothesis.
        resampling: Seed and number of draws.

    Returns:
        ``(1 + hits) / (1 + draws)``; a draw without a figure (nothing to divide by) is a hit.
    """
    _, (a_GCm, b_GCm) = _stacked([a, b], cells)
    combine = _shares(a)
    total_a, total_b = a_GCm.sum(0), b_GCm.sum(0)
    change_GCm = b_GCm - a_GCm
    change_GCm = change_GCm[np.abs(change_GCm).sum((1, 2)) > 0]
    mean_of = [cells.index(cell) for cell in headline]

    def statistics(moved_RCm: Floats) -> Floats:
        difference_RC = combine(total_b - moved_RCm) - combine(total_a + moved_RCm)
        did_RC = difference_RC[:, 1:] - difference_RC[:, :1]
        columns = [difference_RC[:, :1], did_RC]
        if mean_of:
            columns.append(did_RC[:, [k - 1 for k in mean_of]].mean(1, keepdims=True))
        return np.abs(np.concatenate(columns, axis=1))

    observed = statistics(np.zeros((1, *total_a.shape)))[0]
    hits = np.zeros(len(observed))
    rng = np.random.default_rng(resampling.seed)
    rows = max(1, _MAX_NUMBERS // max(1, change_GCm[:1].size, len(change_GCm)))
    for start in range(0, resampling.n_draws, rows):
        size = (min(rows, resampling.n_draws - start), len(change_GCm))
        swapped_RG = rng.integers(0, 2, size=size).astype(np.float64)
        drawn = statistics(np.tensordot(swapped_RG, change_GCm, axes=1))
        # Equal figures summed in another order are ties, and ties count.
        hits += (np.isnan(drawn) | (drawn >= observed - 1e-9)).sum(0)
    p = (1 + hits) / (1 + resampling.n_draws)
    return SwapTests(
        clean=float(p[0]),
        did={cell: float(p[1 + k]) for k, cell in enumerate(cells[1:])},
        primary=float(p[-1]) if mean_of else None,
    )


def _stacked(models: Sequence[OwnMetric], cells: Sequence[Cell]) -> tuple[list[str], list[Floats]]:
    """Images of all models, sorted, and each model's sums ``[G, C, m]``."""
    by_model = [model.image_sums(cells) for model in models]
    images = sorted(set().union(*by_model))
    m = next(iter(by_model[0].values())).shape[1]
    nothing = np.zeros((len(cells), m))
    return images, [np.stack([sums.get(image, nothing) for image in images]) for sums in by_model]


def _shares(model: OwnMetric) -> Callable[[Floats], Floats]:
    metric = model.metric()
    return lambda sums: np.asarray(metric.combine(sums), dtype=np.float64) / metric.scale


def _chunks(weights: Iterator[Floats], sums_GCm: Floats) -> Iterator[Floats]:
    rows = max(1, _MAX_NUMBERS // max(1, sums_GCm[:1].size))
    for part in weights:
        yield from (part[start : start + rows] for start in range(0, len(part), rows))
