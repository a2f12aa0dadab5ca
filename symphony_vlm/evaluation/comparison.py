"""Two models on the same items: paired differences, differences in differences, mean corruption error.

Model A is the declared baseline, B the model compared with it. Everything is computed on the items both were asked,
with the same bootstrap weights on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from symphony_vlm.evaluation.corruptions.catalogue import COMMON
from symphony_vlm.evaluation.quantities import Quantity, difference, log_ratio, mean, ratio, weighted_sum
from symphony_vlm.evaluation.robustness import (
    CLEAN,
    Cell,
    CellRecords,
    ModelScores,
    Resampling,
    common_corruptions,
    corrupted_cells,
    model_robustness,
    score_matrix,
)
from symphony_vlm.evaluation.statistics import Floats, benjamini_hochberg, holm, resampled_means, sign_flip_tests

__all__ = ["compare_models", "mean_corruption_error", "robustness_summary"]

_SMALLEST_ERROR_RISE = 0.005
"""Relative corruption errors are not formed where the baseline's summed rise of the error is smaller."""

_Side = Mapping[Cell, Quantity]


def robustness_summary(models: Sequence[ModelScores], resampling: Resampling) -> dict[str, object]:
    """The ``"robustness"`` block of results.json.

    Args:
        models: Scores by model and task. For each task the first model is the baseline of the others.
        resampling: Seed and numbers of draws.

    Returns:
        JSON with ``parameters``, ``models`` (see `model_robustness`, with the mean corruption errors added) and
        ``comparisons`` (see `compare_models`).
    """
    summaries: list[dict[str, object]] = []
    comparisons: list[dict[str, object]] = []
    baselines: dict[str, ModelScores] = {}
    for scores in models:
        summary = model_robustness(scores, resampling)
        baseline = baselines.setdefault(scores.task, scores)
        if baseline is scores:
            own = {"value": 100.0, "ci_low": None, "ci_high": None, "reason": "100 by definition: it is the baseline"}
            kinds = {"mean_corruption_error": False, "relative_mean_corruption_error": True}
            for kind, relative in kinds.items():
                names, severities = _shared_grid(scores.values, scores.values)
                label = _error_name(names, severities, relative=relative)
                summary[kind] = {**own, "name": label, "baseline": scores.label}
        else:
            comparison = compare_models(baseline, scores, resampling)
            for kind in ("mean_corruption_error", "relative_mean_corruption_error"):
                summary[kind] = comparison.pop(kind)
            comparisons.append(comparison)
        summaries.append(summary)
    return {
        "parameters": {
            "seed": resampling.seed,
            "n_resamples": resampling.n_resamples,
            "n_sign_flips": resampling.n_draws,
            "level": 0.95,
            "interval": "percentile bootstrap over images",
            "smallest_error_rise": _SMALLEST_ERROR_RISE,
        },
        "models": summaries,
        "comparisons": comparisons,
    }


def compare_models(baseline: ModelScores, other: ModelScores, resampling: Resampling) -> dict[str, object]:
    """Everything that sets ``other`` beside ``baseline``.

    Returns:
        JSON. ``clean_difference`` and every ``difference`` are other - baseline; ``did`` is the difference of the
        losses under corruption, positive when ``other`` loses less; ``primary`` is the DiD of the mean over all common
        cells with its p-value (labels of whole images swapped). P-values of cells carry Holm's and Benjamini and
        Hochberg's corrections over all cells of the task.
    """
    shared = _share_items(baseline, other)
    cells = [CLEAN, *corrupted_cells(cell for cell in baseline.values if cell in other.values)]
    bad = cells[1:]
    a_items, images, a_IM, a_why = score_matrix(shared[0], cells, _values(shared[0], baseline))
    _, _, b_IM, b_why = score_matrix(shared[1], cells, _values(shared[1], other))
    common_IM = ~np.isnan(a_IM) & ~np.isnan(b_IM)
    a_IM, b_IM = np.where(common_IM, a_IM, np.nan), np.where(common_IM, b_IM, np.nan)
    a, b = _paired_quantities(a_IM, b_IM, images, cells, {**a_why, **b_why}, baseline, other, resampling)
    headline = [cell for cell in bad if cell[0] in COMMON]
    dids = {cell: _did(a, b, cell) for cell in bad}
    p_values = _did_p_values(a_IM, b_IM, images, cells, resampling) if images else {}
    means = [mean([side[cell] for cell in headline]) for side in (a, b)]
    primary = (
        mean([dids[cell] for cell in headline]) if headline else Quantity(value=None, reason="no common corruption")
    )
    logs = [log_ratio(m, side[CLEAN], name="clean score") for m, side in zip(means, (a, b), strict=True)]
    tested = [cell for cell in bad if cell in p_values]
    by_holm = dict(zip(tested, holm([p_values[c] for c in tested]), strict=True))
    by_bh = dict(zip(tested, benjamini_hochberg([p_values[c] for c in tested]), strict=True))
    return {
        "task": baseline.task,
        "metric": baseline.metric,
        "baseline": baseline.label,
        "model": other.label,
        "n_items": len(a_items),
        "n_images": len(set(images)),
        "n_different_pixels": _different_pixels(shared, cells),
        "clean_difference": {**difference(a[CLEAN], b[CLEAN]).to_json(), "p": _clean_p(a_IM, b_IM, images, resampling)},
        "corrupted_difference": difference(means[0], means[1]).to_json(),
        "primary": {
            "name": f"difference in differences of the mean over {_grid_name(headline)}",
            **primary.to_json(),
            "p": _primary_p(a_IM, b_IM, images, cells, resampling) if headline and images else None,
            "log_scale": difference(logs[0], logs[1]).to_json(),
        },
        "cells": [
            {
                "corruption": cell[0],
                "severity": cell[1],
                "difference": difference(a[cell], b[cell]).to_json(),
                "did": dids[cell].to_json(),
                "p": p_values.get(cell),
                "p_holm": by_holm.get(cell),
                "p_bh": by_bh.get(cell),
            }
            for cell in bad
        ],
        "mean_corruption_error": mean_corruption_error(a, b, baseline=baseline.label),
        "relative_mean_corruption_error": mean_corruption_error(a, b, baseline=baseline.label, relative=True),
    }


def mean_corruption_error(a: _Side, b: _Side, *, baseline: str, relative: bool = False) -> dict[str, object]:
    """100 times the mean over corruptions of ``sum_s E_b / sum_s E_a``, errors ``E = 1 - score``.

    Args:
        a: Scores of the declared baseline, which is printed with the number.
        b: Scores of the model.
        baseline: The baseline's name.
        relative: Use the rise of the error over the clean error instead of the error (relative mCE).

    Returns:
        JSON with ``name`` (called the 15-corruption mCE only if all 15 x 5 cells are there), ``corruptions``,
        ``severities``, ``by_corruption`` and the corruptions left out, with the reason, under ``undefined``.
    """
    names, severities = _shared_grid(a, b)
    by_corruption: dict[str, Quantity] = {}
    for name in names:
        here = [s for s in severities if (name, s) in a and (name, s) in b]
        errors = [_summed_error(side, name, here, relative=relative) for side in (a, b)]
        floor = _SMALLEST_ERROR_RISE if relative else 0.0
        what = f"{'error rise' if relative else 'error'} of {baseline} under {name}"
        by_corruption[name] = ratio(errors[1], errors[0], name=what, floor=floor)
    defined = [quantity for quantity in by_corruption.values() if quantity.value is not None]
    reasons = {name: quantity.reason for name, quantity in by_corruption.items() if quantity.value is None}
    total = (
        mean(defined) if defined else Quantity(value=None, reason=next(iter(reasons.values()), "no common corruption"))
    )
    return {
        "name": _error_name([n for n in names if n not in reasons], severities, relative=relative),
        "baseline": baseline,
        **weighted_sum([total], [100.0]).to_json(),
        "corruptions": names,
        "severities": severities,
        "by_corruption": {name: weighted_sum([q], [100.0]).to_json() for name, q in by_corruption.items()},
        "undefined": reasons,
    }


def _summed_error(side: _Side, name: str, severities: Sequence[int], *, relative: bool) -> Quantity:
    scores = [side[name, severity] for severity in severities]
    if any(q.value is not None and not 0 <= q.value <= 1 for q in scores):
        return Quantity(value=None, reason="the metric is not on a scale from 0 to 1")
    if relative:
        return weighted_sum([side[CLEAN], *scores], [float(len(scores)), *[-1.0] * len(scores)])
    one = Quantity(
        value=1.0, replicates=next((np.ones_like(q.replicates) for q in scores if q.replicates is not None), None)
    )
    return weighted_sum([one, *scores], [float(len(scores)), *[-1.0] * len(scores)])


def _shared_grid(a: Mapping[Cell, object], b: Mapping[Cell, object]) -> tuple[list[str], list[int]]:
    cells = [cell for cell in corrupted_cells(a) if cell in b]
    names = common_corruptions(cells)
    return names, sorted({severity for name, severity in cells if name in names})


def _error_name(names: Sequence[str], severities: Sequence[int], *, relative: bool) -> str:
    kind = "relative mCE" if relative else "mCE"
    if len(names) == len(COMMON) and len(severities) == 5:
        return f"{kind} (15 corruptions, severities 1 to 5)"
    long = "relative mean corruption error" if relative else "mean corruption error"
    levels = ", ".join(str(severity) for severity in severities)
    return f"{long} over {len(names)} of the 15 corruptions (severities {levels or 'none'})"


def _grid_name(cells: Sequence[Cell]) -> str:
    names, severities = {name for name, _ in cells}, {severity for _, severity in cells}
    if len(cells) == len(names) * len(severities):
        return f"{_count(len(names), 'corruption')} x {_count(len(severities), 'severity')}"
    return _count(len(cells), "corrupted cell")


def _count(number: int, noun: str) -> str:
    plural = "severities" if noun == "severity" else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def _share_items(a: ModelScores, b: ModelScores) -> tuple[dict[Cell, CellRecords], dict[Cell, CellRecords]]:
    first: dict[Cell, CellRecords] = {}
    second: dict[Cell, CellRecords] = {}
    for cell, records in a.records.items():
        if cell in b.records:
            shared = set(records.item_ids) & set(b.records[cell].item_ids)
            if shared:
                first[cell], second[cell] = _only(records, shared), _only(b.records[cell], shared)
    return first, second


def _only(records: CellRecords, items: set[str]) -> CellRecords:
    if len(items) == len(records.item_ids):
        return records
    keep = [row for row, item in enumerate(records.item_ids) if item in items]
    return CellRecords(
        item_ids=tuple(records.item_ids[row] for row in keep),
        images=tuple(records.images[row] for row in keep),
        scores=records.scores[keep],
        answers=tuple(records.answers[row] for row in keep),
        pixels=tuple(records.pixels[row] for row in keep),
    )


def _values(records: Mapping[Cell, CellRecords], scores: ModelScores) -> dict[Cell, float | None]:
    """Scores to check the items against; those of a subset of the items cannot be, so they are their own mean."""
    values = dict(scores.values)
    for cell, part in records.items():
        if len(part.item_ids) < len(scores.records[cell].item_ids):
            values[cell] = None if np.isnan(part.scores).all() else float(np.nanmean(part.scores))
    return values


def _paired_quantities(
    a_IM: Floats,
    b_IM: Floats,
    images: Sequence[str],
    cells: Sequence[Cell],
    reasons: Mapping[Cell, str],
    baseline: ModelScores,
    other: ModelScores,
    resampling: Resampling,
) -> tuple[dict[Cell, Quantity], dict[Cell, Quantity]]:
    sides: tuple[dict[Cell, Quantity], dict[Cell, Quantity]] = ({}, {})
    means = replicates = None
    if images:
        both = np.concatenate([a_IM, b_IM], axis=1)
        means, replicates = resampled_means(both, images, seed=resampling.seed, n_resamples=resampling.n_resamples)
    for side, scores, offset in zip(sides, (baseline, other), (0, len(cells)), strict=True):
        for column, cell in enumerate(cells):
            if means is None or replicates is None or cell in reasons or np.isnan(means[offset + column]):
                value = scores.values.get(cell)
                why = reasons.get(cell, "no items in common") if value is not None else "the cell has no score"
                side[cell] = Quantity(value=value, reason=why)
            else:
                side[cell] = Quantity(value=float(means[offset + column]), replicates=replicates[:, offset + column])
    return sides


def _did(a: _Side, b: _Side, cell: Cell) -> Quantity:
    return weighted_sum([b[cell], b[CLEAN], a[cell], a[CLEAN]], [1.0, -1.0, -1.0, 1.0])


def _drops(a_IM: Floats, b_IM: Floats) -> Floats:
    """Item-wise differences in differences ``[I, M - 1]`` (column 0 is the clean cell)."""
    drops: Floats = (b_IM[:, 1:] - b_IM[:, :1]) - (a_IM[:, 1:] - a_IM[:, :1])
    return drops


def _did_p_values(
    a_IM: Floats, b_IM: Floats, images: Sequence[str], cells: Sequence[Cell], resampling: Resampling
) -> dict[Cell, float]:
    drops_IM = _drops(a_IM, b_IM)
    p_values = sign_flip_tests(drops_IM, images, seed=resampling.seed, n_draws=resampling.n_draws)
    usable = ~np.isnan(drops_IM).all(0)
    return {cell: p for cell, p, ok in zip(cells[1:], p_values, usable, strict=True) if ok}


def _primary_p(
    a_IM: Floats, b_IM: Floats, images: Sequence[str], cells: Sequence[Cell], resampling: Resampling
) -> float | None:
    columns = [column for column, cell in enumerate(cells[1:]) if cell[0] in COMMON]
    drops_IM = _drops(a_IM, b_IM)[:, columns]
    if np.isnan(drops_IM).all():
        return None
    # An image counts as the mean of its items' mean losses, the same weights as in the estimate when nothing is missing.
    total_I1 = np.nan_to_num(drops_IM, nan=0.0).sum(1, keepdims=True)
    return sign_flip_tests(total_I1, images, seed=resampling.seed, n_draws=resampling.n_draws)[0]


def _clean_p(a_IM: Floats, b_IM: Floats, images: Sequence[str], resampling: Resampling) -> float | None:
    difference_I1 = b_IM[:, :1] - a_IM[:, :1]
    if not images or np.isnan(difference_I1).all():
        return None
    return sign_flip_tests(difference_I1, images, seed=resampling.seed, n_draws=resampling.n_draws)[0]


def _different_pixels(
    sides: tuple[Mapping[Cell, CellRecords], Mapping[Cell, CellRecords]], cells: Sequence[Cell]
) -> int:
    """Items that were shown to the two models with different pixels: they are not paired after all."""
    count = 0
    for cell in cells:
        if cell in sides[0]:
            first, second = (dict(zip(side[cell].item_ids, side[cell].pixels, strict=True)) for side in sides)
            count += sum(bool(value) and bool(second[item]) and value != second[item] for item, value in first.items())
    return count
