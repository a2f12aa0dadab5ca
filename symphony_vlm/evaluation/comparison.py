"""Two models on the same items: paired differences, differences in differences, mean corruption error.

Model A is the declared baseline, B the model compared with it. Everything is computed on the items both were asked,
with the same bootstrap weights on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from symphony_vlm.corruptions.catalogue import COMMON
from symphony_vlm.evaluation.cell_differences import difference_tests
from symphony_vlm.evaluation.own_metric import SwapTests, own_quantities, swap_tests
from symphony_vlm.evaluation.quantities import (
    Quantity,
    Resampling,
    column_means,
    constant,
    difference,
    log_ratio,
    mean,
    ratio,
    weighted_sum,
)
from symphony_vlm.evaluation.robustness import (
    CLEAN,
    NOT_THE_MEAN,
    Cell,
    ModelScores,
    common_corruptions,
    corrupted_cells,
    is_mean_of_items,
    model_robustness,
    of_items,
    restrict,
    score_matrix,
    shared_items,
)
from symphony_vlm.evaluation.seeds import seed_summary
from symphony_vlm.evaluation.statistics import Floats, benjamini_hochberg, holm, sign_flip_tests

__all__ = ["compare_models", "mean_corruption_error", "robustness_summary"]

_SMALLEST_ERROR_RISE = 0.005
"""Relative corruption errors are not formed where the baseline's summed rise of the error is smaller."""

_INTERVALS = {"percentile": "percentile", "bca": "bias-corrected and accelerated (BCa)"}

_Side = Mapping[Cell, Quantity]


def robustness_summary(models: Sequence[ModelScores], resampling: Resampling) -> dict[str, object]:
    """The ``"robustness"`` block of results.json.

    Args:
        models: Scores by model and task. For each task the first model is the baseline of the others.
        resampling: Seed and numbers of draws.

    Returns:
        JSON with ``parameters``, ``models`` (see `model_robustness`, with the mean corruption errors added),
        ``comparisons`` (see `compare_models`) and ``seeds`` (see `seed_summary`).
    """
    summaries: list[dict[str, object]] = []
    comparisons: list[dict[str, object]] = []
    baselines: dict[str, ModelScores] = {}
    for scores in models:
        summary = model_robustness(scores, resampling)
        baseline = baselines.setdefault(scores.task, scores)
        if baseline is scores:
            own = {"value": 100.0, "ci_low": None, "ci_high": None, "reason": "by definition"}
            kinds = {"mean_corruption_error": False, "relative_mean_corruption_error": True}
            for kind, relative in kinds.items():
                cells = [cell for cell in corrupted_cells(scores.values) if cell[0] in COMMON]
                label = _error_name(cells, relative=relative)
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
            "interval": f"{_INTERVALS[resampling.interval]} bootstrap over images",
            "smallest_error_rise": _SMALLEST_ERROR_RISE,
        },
        "models": summaries,
        "comparisons": comparisons,
        "seeds": seed_summary(summaries),
    }


def compare_models(baseline: ModelScores, other: ModelScores, resampling: Resampling) -> dict[str, object]:
    """Everything that sets ``other`` beside ``baseline``.

    Returns:
        JSON. ``clean_difference`` and every ``difference`` are other - baseline; ``did`` is the difference of the
        losses under corruption, positive when ``other`` loses less; ``primary`` is the DiD of the mean over all common
        cells with its p-value (labels of whole images swapped). P-values of cells carry Holm's and Benjamini and
        Hochberg's corrections over all cells of the task; each cell also has `difference_tests`.
    """
    cells = [CLEAN, *corrupted_cells(cell for cell in baseline.values if cell in other.values)]
    bad = cells[1:]
    clean_items = shared_items([baseline, other], [CLEAN])
    clean_sides = (restrict(baseline, clean_items), restrict(other, clean_items))
    shared = shared_items([baseline, other], cells)
    sides = (restrict(baseline, shared), restrict(other, shared)) if shared else (baseline, other)
    items = [tuple(map(of_items, pair)) for pair in (sides, clean_sides)]
    images, a_IM, b_IM, a, b = _paired(items[0], cells if shared else [], cells, resampling)
    clean_images, clean_a, clean_b, first, second = _paired(items[1], [CLEAN], [CLEAN], resampling)
    headline = [cell for cell in bad if cell[0] in COMMON]
    own = _own_figures(sides, cells, headline, resampling) if shared else None
    if own is not None:
        a, b, swapped = own
    own_clean = _own_figures(clean_sides, [CLEAN], [], resampling) if clean_items else None
    if own_clean is not None:
        first, second, swapped_clean = own_clean
    dids = {cell: _did(a, b, cell) for cell in bad}
    p_values = _did_p_values(a_IM, b_IM, images, cells, resampling) if images else {}
    primary_p = _primary_p(a_IM, b_IM, images, cells, resampling) if headline and images else None
    clean_p = _clean_p(clean_a, clean_b, clean_images, resampling)
    if own is not None:
        p_values, primary_p = dict(swapped.did), swapped.primary
    if own_clean is not None:
        clean_p = swapped_clean.clean
    means = [mean([side[cell] for cell in headline]) for side in (a, b)]
    primary = (
        mean([dids[cell] for cell in headline]) if headline else Quantity(value=None, reason="no common corruption")
    )
    logs = [log_ratio(m, side[CLEAN], name="clean score") for m, side in zip(means, (a, b), strict=True)]
    tested = [cell for cell in bad if cell in p_values]
    by_holm = dict(zip(tested, holm([p_values[c] for c in tested]), strict=True))
    by_bh = dict(zip(tested, benjamini_hochberg([p_values[c] for c in tested]), strict=True))
    plain = difference_tests(a_IM[:, 1:], b_IM[:, 1:], images, bad, resampling) if images else {}
    return {
        "task": baseline.task,
        "metric": baseline.metric,
        "baseline": baseline.label,
        "model": other.label,
        "n_items": len(shared),
        "n_images": len(set(images)),
        "n_different_pixels": _different_pixels(sides, cells),
        "clean_difference": {
            **difference(first[CLEAN], second[CLEAN]).to_json(),
            "p": clean_p,
            "n_items": len(clean_items),
            "n_images": len(set(clean_images)),
        },
        "corrupted_difference": difference(means[0], means[1]).to_json(),
        "primary": {
            "name": f"difference in differences of the mean over {_grid_name(headline)}",
            **primary.to_json(),
            "p": primary_p,
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
                "did_log": _log_did(a, b, cell).to_json(),
                **plain.get(cell, {}),
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
    cells = [cell for cell in corrupted_cells(a) if cell in b]
    by_corruption: dict[str, Quantity] = {}
    for name in names:
        here = [severity for corruption, severity in cells if corruption == name]
        errors = [_summed_error(side, name, here, relative=relative) for side in (a, b)]
        floor = _SMALLEST_ERROR_RISE if relative else 0.0
        what = f"{'error rise' if relative else 'error'} of {baseline} under {name}"
        by_corruption[name] = ratio(errors[1], errors[0], name=what, floor=floor)
    defined = [quantity for quantity in by_corruption.values() if quantity.value is not None]
    used = [(name, s) for name, s in cells if name in names and by_corruption[name].value is not None]
    reasons = {name: quantity.reason for name, quantity in by_corruption.items() if quantity.value is None}
    total = (
        mean(defined) if defined else Quantity(value=None, reason=next(iter(reasons.values()), "no common corruption"))
    )
    return {
        "name": _error_name(used, relative=relative),
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
    one = constant(1.0, next((q for q in scores if q.replicates is not None), scores[0]))
    return weighted_sum([one, *scores], [float(len(scores)), *[-1.0] * len(scores)])


def _shared_grid(a: Mapping[Cell, object], b: Mapping[Cell, object]) -> tuple[list[str], list[int]]:
    cells = [cell for cell in corrupted_cells(a) if cell in b]
    names = common_corruptions(cells)
    return names, sorted({severity for name, severity in cells if name in names})


def _error_name(cells: Sequence[Cell], *, relative: bool) -> str:
    kind = "relative mCE" if relative else "mCE"
    if len(cells) == len(COMMON) * 5:
        return f"{kind} (15 corruptions, severities 1 to 5)"
    long = "relative mean corruption error" if relative else "mean corruption error"
    levels = ", ".join(str(severity) for severity in sorted({severity for _, severity in cells}))
    return f"{long} over {len({name for name, _ in cells})} of the 15 corruptions (severities {levels or 'none'})"


def _grid_name(cells: Sequence[Cell]) -> str:
    names, severities = {name for name, _ in cells}, {severity for _, severity in cells}
    if len(cells) == len(names) * len(severities):
        return f"{_count(len(names), 'corruption')} x {_count(len(severities), 'severity')}"
    return _count(len(cells), "corrupted cell")


def _count(number: int, noun: str) -> str:
    plural = "severities" if noun == "severity" else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def _paired(
    sides: Sequence[ModelScores], resampled: Sequence[Cell], cells: Sequence[Cell], resampling: Resampling
) -> tuple[list[str], Floats, Floats, dict[Cell, Quantity], dict[Cell, Quantity]]:
    """Images, item scores ``[I, M]`` and cell scores of both models, under the same weights.

    An item that lacks a score on one side counts on neither. Cells outside ``resampled`` keep their bare score.
    """
    _, images, a_IM, a_why = score_matrix(sides[0].records, resampled, sides[0].values)
    _, _, b_IM, b_why = score_matrix(sides[1].records, resampled, sides[1].values)
    if a_IM.shape != b_IM.shape:  # One side has no item scores at all.
        images, a_IM, b_IM = [], a_IM[:0], b_IM[:0]
    reasons = {**a_why, **b_why}
    one_sided = np.isnan(a_IM) | np.isnan(b_IM)
    a_IM, b_IM = np.where(one_sided, np.nan, a_IM), np.where(one_sided, np.nan, b_IM)
    quantities: tuple[dict[Cell, Quantity], dict[Cell, Quantity]] = ({}, {})
    drawn = column_means(np.concatenate([a_IM, b_IM], axis=1), images, resampling) if images else []
    for side, scores, offset in zip(quantities, sides, (0, len(resampled)), strict=True):
        for column, cell in enumerate(cells):
            known = images and cell in resampled and cell not in reasons
            if known and drawn[offset + column].value is not None:
                side[cell] = drawn[offset + column]
            else:
                why = reasons.get(cell) or _why_not_paired(scores, cell)
                side[cell] = Quantity(value=scores.values.get(cell), reason=why)
    return images, a_IM, b_IM, *quantities


def _why_not_paired(scores: ModelScores, cell: Cell) -> str:
    if scores.values.get(cell) is None:
        return "the cell has no score"
    if cell not in scores.records:
        return "no predictions file for this cell"
    return "no items in common" if is_mean_of_items(scores, cell) else NOT_THE_MEAN


def _own_figures(
    sides: Sequence[ModelScores], cells: Sequence[Cell], headline: Sequence[Cell], resampling: Resampling
) -> tuple[dict[Cell, Quantity], dict[Cell, Quantity], SwapTests] | None:
    """Figures and tests of a metric that is no mean of item scores; None where it is one, or cannot be recomputed."""
    first, second = (side.own for side in sides)
    if first is None or second is None:
        return None
    a, b = own_quantities([first, second], cells, resampling)
    return a, b, swap_tests(first, second, cells, headline, resampling)


def _did(a: _Side, b: _Side, cell: Cell) -> Quantity:
    return weighted_sum([b[cell], b[CLEAN], a[cell], a[CLEAN]], [1.0, -1.0, -1.0, 1.0])


def _log_did(a: _Side, b: _Side, cell: Cell) -> Quantity:
    """On the log scale: equal drops from unequal clean scores are not equal robustness."""
    return difference(*(log_ratio(side[cell], side[CLEAN], name="clean score") for side in (a, b)))


def _drops(a_IM: Floats, b_IM: Floats) -> Floats:
    """Item-wise differences in differences ``[I, M - 1]`` (column 0 is the clean cell)."""
    drops: Floats = (b_IM[:, 1:] - b_IM[:, :1]) - (a_IM[:, 1:] - a_IM[:, :1])
    return drops


def _did_p_values(
    a_IM: Floats, b_IM: Floats, images: Sequence[str], cells: Sequence[Cell], resampling: Resampling
) -> dict[Cell, float]:
    drops_IM = _drops(a_IM, b_IM)
    p_values = sign_flip_tests(drops_IM, images, seed=resampling.seed, n_draws=resampling.n_draws)
    usable = [bool(column.any()) for column in ~np.isnan(drops_IM).T]
    return {cell: p for cell, p, ok in zip(cells[1:], p_values, usable, strict=True) if ok}


def _primary_p(
    a_IM: Floats, b_IM: Floats, images: Sequence[str], cells: Sequence[Cell], resampling: Resampling
) -> float | None:
    columns = [column for column, cell in enumerate(cells[1:]) if cell[0] in COMMON]
    drops_IM = _drops(a_IM, b_IM)[:, columns]
    if np.isnan(drops_IM).all():
        return None
    # Sums over cells: the weights of the estimate, when no score is missing.
    total_I1 = np.nan_to_num(drops_IM, nan=0.0).sum(1, keepdims=True)
    return sign_flip_tests(total_I1, images, seed=resampling.seed, n_draws=resampling.n_draws)[0]


def _clean_p(a_IM: Floats, b_IM: Floats, images: Sequence[str], resampling: Resampling) -> float | None:
    difference_I1 = b_IM[:, :1] - a_IM[:, :1]
    if not images or np.isnan(difference_I1).all():
        return None
    return sign_flip_tests(difference_I1, images, seed=resampling.seed, n_draws=resampling.n_draws)[0]


def _different_pixels(sides: Sequence[ModelScores], cells: Sequence[Cell]) -> int:
    """Items that were shown to the two models with different pixels: they are not paired after all."""
    count = 0
    for cell in cells:
        if all(cell in side.records for side in sides):
            records = [side.records[cell] for side in sides]
            first, second = (dict(zip(part.item_ids, part.pixels, strict=True)) for part in records)
            count += sum(bool(value) and bool(second.get(i)) and value != second[i] for i, value in first.items())
    return count
