"""Figures of whole cells with intervals, from the sums of their items.

Shape letters: I items, G images, L sparse layers, M modalities, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from symphony_vlm.evaluation.routing.drift import COUNTS, FIGURES, drift_figures
from symphony_vlm.evaluation.routing.prompts import MODALITIES
from symphony_vlm.evaluation.statistics import bootstrap_weights

__all__ = ["ResampledFigures", "counts_json", "figures_json", "resampled_figures"]

Array = NDArray[Any]

LEVEL = 0.95


class ResampledFigures:
    """Figures with their bootstrap replicates; those of several cells can be averaged.

    Args:
        values: by name ``[L + 1, M]``; the first row is the mean over layers.
        replicates: by name ``[R, L + 1, M]``.
    """

    def __init__(self, values: Mapping[str, Array], replicates: Mapping[str, Array]) -> None:
        self.values = dict(values)
        self.replicates = dict(replicates)

    @staticmethod
    def mean(parts: Iterator[ResampledFigures]) -> ResampledFigures | None:
        """The unweighted mean over cells, replicate by replicate, one in memory at a time; None of none."""
        total: ResampledFigures | None = None
        count = 0
        for part in parts:
            count += 1
            if total is None:
                total = ResampledFigures(part.values, part.replicates)
                continue
            for name in part.values:
                total.values[name] = total.values[name] + part.values[name]
                total.replicates[name] = total.replicates[name] + part.replicates[name]
        if total is None:
            return None
        return ResampledFigures(
            {name: value / count for name, value in total.values.items()},
            {name: value / count for name, value in total.replicates.items()},
        )


def resampled_figures(
    sums: Mapping[str, Array], images: Sequence[str], universe: Sequence[str], *, seed: int, n_resamples: int
) -> ResampledFigures:
    """Figures of a cell and their image-clustered bootstrap replicates.

    Args:
        sums: of `drift_sums`, ``[I, L, M]`` and ``[I, L, M, n]``.
        images: of each item.
        universe: all images of the task, sorted: cells that share it share their weights, so that a mean over cells
            can be taken replicate by replicate.
        seed: of the weights.
        n_resamples: R.
    """
    row_of = {image: row for row, image in enumerate(universe)}
    rows_I = np.array([row_of[image] for image in images])
    by_image = {name: _by_image(array, rows_I, len(universe)) for name, array in sums.items()}
    total = {name: array.sum(0) for name, array in by_image.items()}
    replicates: dict[str, list[Array]] = {name: [] for name in FIGURES}
    for weights_RG in bootstrap_weights(len(universe), seed=seed, n_resamples=n_resamples):
        resampled = {
            name: (weights_RG @ array.reshape(len(array), -1)).reshape(-1, *array.shape[1:])
            for name, array in by_image.items()
        }
        for name, values in drift_figures(resampled).items():
            replicates[name].append(_with_mean(values).astype(np.float32))
    point = {name: _with_mean(value) for name, value in drift_figures(total).items()}
    return ResampledFigures(point, {name: np.concatenate(parts) for name, parts in replicates.items()})


def figures_json(figures: ResampledFigures, layers: Sequence[str]) -> dict[str, Any]:
    """By layer (``all`` is the mean over them) and modality: each figure with its interval; None where undefined."""
    low, high = {}, {}
    for name, replicates in figures.replicates.items():
        with np.errstate(invalid="ignore"):
            low[name], high[name] = np.nanquantile(
                np.where(np.isnan(figures.values[name]), 0, replicates), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0
            )
    return {
        layer: {
            kind: {
                name: {
                    "value": _number(figures.values[name][row, m]),
                    "ci_low": _number(low[name][row, m], figures.values[name][row, m]),
                    "ci_high": _number(high[name][row, m], figures.values[name][row, m]),
                }
                for name in FIGURES
            }
            for m, kind in enumerate(MODALITIES)
        }
        for row, layer in enumerate(["all", *layers])
    }


def counts_json(sums: Mapping[str, Array], layers: Sequence[str]) -> dict[str, Any]:
    """By layer and modality, the integer counts of a cell."""
    totals = {name: sums[name].sum(0, dtype=np.int64) for name in COUNTS}
    return {
        layer: {kind: {name: totals[name][row, m].tolist() for name in COUNTS} for m, kind in enumerate(MODALITIES)}
        for row, layer in enumerate(layers)
    }


def _by_image(array_I: Array, rows_I: Array, n_images: int) -> Array:
    result = np.zeros((n_images, *array_I.shape[1:]))
    np.add.at(result, rows_I, array_I)
    return result


def _with_mean(values_XLM: Array) -> Array:
    """The mean over layers in front of them."""
    return np.concatenate([values_XLM.mean(-2, keepdims=True), values_XLM], axis=-2)


def _number(value: Any, of: Any = 0.0) -> float | None:
    return None if np.isnan(value) or np.isnan(of) else float(value)
