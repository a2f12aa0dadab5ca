"""Robustness of one model to image corruptions, from its cell scores and item scores.

A cell is a (corruption, severity) pair; ``("none", 0)`` is the clean one. Scores lie in [0, 1], errors are 1 - score.
Means run over the fifteen common corruptions of ImageNet-C (arXiv 1903.12261) as far as they were evaluated, unweighted
over cells; the extra corruptions appear in the tables of cells only.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from symphony_vlm.corruptions.catalogue import COMMON, CORRUPTIONS
from symphony_vlm.evaluation.answer_format import format_figures
from symphony_vlm.evaluation.cell_records import CLEAN, Cell, CellRecords
from symphony_vlm.evaluation.own_metric import OwnMetric, own_quantities
from symphony_vlm.evaluation.quantities import (
    Quantity,
    Resampling,
    column_means,
    constant,
    difference,
    mean,
    ratio,
    weighted_sum,
)
from symphony_vlm.evaluation.statistics import Floats, holm, mcnemar, sign_flip_tests

__all__ = [
    "AGREEMENT",
    "CLEAN",
    "NOT_THE_MEAN",
    "Cell",
    "CellRecords",
    "ModelScores",
    "Resampling",
    "cell_quantities",
    "common_corruptions",
    "corrupted_cells",
    "is_mean_of_items",
    "model_robustness",
    "of_items",
    "restrict",
    "score_matrix",
    "severity_auc",
    "shared_items",
]

NOT_THE_MEAN = "the score in results.json is not the mean of the item scores"
AGREEMENT = 1e-4
"""How far a score in results.json may lie from the mean of its item scores before we stop resampling those."""


@dataclass(frozen=True, kw_only=True)
class ModelScores:
    """What one model got on one task."""

    label: str
    model: str
    router: str
    task: str
    metric: str
    values: Mapping[Cell, float | None]
    """Scores as results.json gives them."""
    records: Mapping[Cell, CellRecords] = field(default_factory=dict)
    chance: float | None = None
    """Score of the best constant answer, if it was measured."""
    chance_name: str = "constant answer"
    best: float = 1.0
    """What 1 stands for on the benchmark's own scale (2,000 of MME's perception)."""
    own: OwnMetric | None = None
    """Where the figure is no mean of item scores and its items were found."""


def is_mean_of_items(scores: ModelScores, cell: Cell) -> bool:
    """Whether a cell's score in results.json is the mean of its item scores."""
    return cell in scores.records and _consistent(scores.records[cell].scores, scores.values.get(cell)) is not None


def of_items(scores: ModelScores) -> ModelScores:
    """The same model with the mean of its item scores in every cell: flips are about items, whatever the figure is."""
    if scores.own is None:
        return scores
    means = {cell: float(np.nanmean(records.scores)) for cell, records in scores.records.items()}
    return replace(scores, values={**scores.values, **means}, own=None)


def corrupted_cells(cells: Iterable[Cell]) -> list[Cell]:
    """The cells other than the clean one, in the catalogue's order of corruptions, then by severity."""
    order = {name: index for index, name in enumerate(CORRUPTIONS)}
    return sorted((cell for cell in cells if cell != CLEAN), key=lambda c: (order.get(c[0], len(order)), c))


def common_corruptions(cells: Iterable[Cell]) -> list[str]:
    """Those of the fifteen common corruptions that occur in ``cells``, in their usual order."""
    present = {corruption for corruption, _ in cells}
    return [name for name in COMMON if name in present]


def score_matrix(
    records: Mapping[Cell, CellRecords], cells: Sequence[Cell], values: Mapping[Cell, float | None]
) -> tuple[list[str], list[str], Floats, dict[Cell, str]]:
    """Item scores of several cells as one matrix.

    An item without a score is left out of its cell, or counts 0 where only that reproduces the score in results.json.

    Returns:
        Item ids and their images (I each, sorted by id), scores ``[I, M]`` (NaN: no score), and, for each cell whose
        item scores do not give the score in results.json, the reason why it cannot be resampled.
    """
    usable: dict[Cell, Floats] = {}
    unusable: dict[Cell, str] = {}
    images: dict[str, str] = {}
    for cell in cells:
        found = None if cell not in records else _consistent(records[cell].scores, values.get(cell))
        if found is not None:
            usable[cell] = found
            images.update(zip(records[cell].item_ids, records[cell].images, strict=True))
        elif cell in records:
            unusable[cell] = NOT_THE_MEAN
        else:
            unusable[cell] = "no predictions file for this cell"
    row_of = {item: row for row, item in enumerate(sorted(images))}
    scores_IM = np.full((len(row_of), len(cells)), np.nan)
    for column, cell in enumerate(cells):
        if cell in usable:
            scores_IM[[row_of[item] for item in records[cell].item_ids], column] = usable[cell]
    return list(row_of), [images[item] for item in row_of], scores_IM, unusable


def _consistent(scores: Floats, value: float | None) -> Floats | None:
    if value is None or np.isnan(scores).all():
        return None
    for candidate in (scores, np.nan_to_num(scores, nan=0.0)):
        if abs(float(np.nanmean(candidate)) - value) <= AGREEMENT:
            return candidate
    return None


def shared_items(models: Sequence[ModelScores], cells: Collection[Cell]) -> set[str]:
    """Items that every model was asked in each of the cells; cells without usable item scores do not count.

    Empty if one of the models has no usable cell.
    """
    asked: list[set[str]] = []
    for scores in models:
        if scores.own is not None:
            asked.extend(set(scores.own.outcomes[cell]) for cell in cells)
            continue
        usable = [
            set(scores.records[cell].item_ids)
            for cell in cells
            if cell in scores.records and _consistent(scores.records[cell].scores, scores.values.get(cell)) is not None
        ]
        asked.extend(usable or [set()])
    return set.intersection(*asked)


def restrict(scores: ModelScores, items: set[str]) -> ModelScores:
    """The same model on fewer items, its scores recomputed.

    Corrupted cells often hold a part of the clean items; a ratio or difference needs the same items on both sides.
    Cells without usable item scores keep the score they have.
    """
    if scores.own is not None:
        return _restrict_own(scores, scores.own.restrict(items), items)
    values, kept = dict(scores.values), dict(scores.records)
    for cell, records in scores.records.items():
        usable = _consistent(records.scores, scores.values.get(cell))
        rows = [row for row, item in enumerate(records.item_ids) if item in items]
        if usable is None or len(rows) == len(records.item_ids):
            continue
        kept[cell] = replace(records, scores=usable).rows(rows)
        scored = usable[rows][~np.isnan(usable[rows])]
        values[cell] = float(scored.mean()) if len(scored) else None
    return replace(scores, values=values, records=kept)


def _restrict_own(scores: ModelScores, own: OwnMetric, items: set[str]) -> ModelScores:
    kept = {
        cell: records.rows([row for row, item in enumerate(records.item_ids) if item in items])
        for cell, records in scores.records.items()
    }
    values = {cell: own.value(cell) for cell in scores.values}
    return replace(scores, values=values, records=kept, own=own)


def cell_quantities(scores: ModelScores, resampling: Resampling) -> dict[Cell, Quantity]:
    """The score of every cell of a model, all resampled with the same weights."""
    cells = list(scores.values)
    if scores.own is not None:
        return own_quantities([scores.own], cells, resampling)[0]
    _, images, scores_IM, unusable = score_matrix(scores.records, cells, scores.values)
    columns = column_means(scores_IM, images, resampling) if images else None
    result: dict[Cell, Quantity] = {}
    for column, cell in enumerate(cells):
        value = scores.values[cell]
        if value is None:
            result[cell] = Quantity(value=None, reason="the cell has no score (too many errors)")
        elif cell in unusable or columns is None:
            result[cell] = Quantity(value=value, reason=unusable.get(cell, "no item scores"))
        else:
            result[cell] = replace(columns[column], value=value)
    return result


def severity_auc(by_severity: Mapping[int, Quantity]) -> Quantity:
    """Area under the score over severity, divided by the range of severities.

    With severities 0 (clean) to 5 it is ``(1/5) sum_{s=1..5} (S_{s-1} + S_s) / 2``; severities that were left out are
    bridged by a straight line.

    Args:
        by_severity: Score by severity, 0 included.
    """
    levels = sorted(by_severity)
    if len(levels) < 2 or levels[0] != 0:
        return Quantity(value=None, reason="needs the clean score and at least one severity")
    weights = dict.fromkeys(levels, 0.0)
    for left, right in itertools.pairwise(levels):
        weights[left] += (right - left) / 2 / levels[-1]
        weights[right] += (right - left) / 2 / levels[-1]
    return weighted_sum([by_severity[s] for s in levels], [weights[s] for s in levels])


def model_robustness(scores: ModelScores, resampling: Resampling) -> dict[str, object]:
    """Every robustness figure of one model that needs no second model.

    Args:
        scores: The model's scores; item scores give intervals, flips and tests.
        resampling: Seed and numbers of draws.

    Returns:
        JSON: ``clean`` (over the items that the corrupted cells hold too), ``mean_corrupted``, ``drop``,
        ``retention``, ``relative_drop``, ``retention_above_chance``, ``severity_auc``, ``families``, ``flips``,
        ``cells``, and which corruptions and severities they cover. A number is ``{"value", "ci_low", "ci_high"}`` with
        a ``"reason"`` where one of them is null.
    """
    asked = len(scores.records[CLEAN].item_ids) if CLEAN in scores.records else None
    shared = shared_items([scores], scores.values)
    scores = restrict(scores, shared)
    quantities = cell_quantities(scores, resampling)
    cells = corrupted_cells(quantities)
    headline = common_corruptions(cells)
    clean = quantities.get(CLEAN, Quantity(value=None, reason="the clean images were not evaluated"))
    means = [quantities[cell] for cell in cells if cell[0] in headline]
    corrupted = mean(means) if means else Quantity(value=None, reason="no common corruption was evaluated")
    retention = ratio(corrupted, clean, name="clean score")
    curves = {name: {s: quantities[c, s] for c, s in cells if c == name} | {0: clean} for name, _ in cells}
    areas = {name: severity_auc(curve) for name, curve in curves.items()}
    flips, flip_cells = _flips(of_items(scores), cells, headline, resampling)
    form, form_cells = format_figures(scores.records, cells, headline, resampling)
    return {
        "label": scores.label,
        "model": scores.model,
        "router": scores.router,
        "task": scores.task,
        "metric": scores.metric,
        "best": scores.best,
        "n_items": len(shared) or None,
        "n_clean_items": asked,
        "corruptions": headline,
        "extra_corruptions": [name for name in curves if name not in headline],
        "severities": sorted({severity for _, severity in cells}),
        "complete": len([cell for cell in cells if cell[0] in headline]) == len(COMMON) * 5,
        "clean": clean.to_json(),
        "mean_corrupted": corrupted.to_json(),
        "drop": difference(corrupted, clean).to_json(),
        "retention": retention.to_json(),
        "relative_drop": _one_minus(retention).to_json(),
        "retention_above_chance": _above_chance(corrupted, clean, scores),
        "severity_auc": {
            "mean": mean([areas[name] for name in headline]).to_json(),
            "mean_over_clean": ratio(mean([areas[name] for name in headline]), clean, name="clean score").to_json(),
            "by_corruption": {name: area.to_json() for name, area in areas.items()},
        },
        "families": _families(quantities, cells),
        "flips": flips,
        "format": form,
        "cells": [
            {
                "corruption": cell[0],
                "severity": cell[1],
                "score": quantities[cell].to_json(),
                "retention": ratio(quantities[cell], clean, name="clean score").to_json(),
                **flip_cells.get(cell, {}),
                **form_cells.get(cell, {}),
            }
            for cell in cells
        ],
    }


def _one_minus(part: Quantity) -> Quantity:
    if part.value is None:
        return part
    return replace(difference(part, constant(1.0, part)), reason=part.reason)


def _above_chance(corrupted: Quantity, clean: Quantity, scores: ModelScores) -> dict[str, object]:
    chance = scores.chance
    if chance is None:
        return Quantity(value=None, reason="no constant answer was measured").to_json()
    base = constant(chance, clean)
    if clean.value is not None and clean.value <= chance:
        return Quantity(value=None, reason=f"the clean score is not above the {scores.chance_name}").to_json()
    above = ratio(difference(base, corrupted), difference(base, clean), name="clean score above the constant answer")
    return {**above.to_json(), "chance": chance, "chance_name": scores.chance_name}


def _families(quantities: Mapping[Cell, Quantity], cells: Sequence[Cell]) -> dict[str, object]:
    result: dict[str, object] = {}
    for family in ("noise", "blur", "weather", "digital"):
        names = [name for name in COMMON if CORRUPTIONS[name].family == family]
        parts = [quantities[cell] for cell in cells if cell[0] in names]
        if parts:
            result[family] = mean(parts).to_json()
    return result


def _flips(
    scores: ModelScores, cells: Sequence[Cell], headline: Sequence[str], resampling: Resampling
) -> tuple[dict[str, object], dict[Cell, dict[str, object]]]:
    """Which items change under corruption, over all headline cells and by cell.

    Right means a score of at least 0.5, so that partial credit (VQA accuracy) has flips too.
    """
    items, images, scores_IM, unusable = score_matrix(scores.records, [CLEAN, *cells], scores.values)
    known = [cell for cell in cells if cell not in unusable]
    if CLEAN in unusable or not known:
        return Quantity(value=None, reason=unusable.get(CLEAN, "no corrupted item scores")).to_json(), {}
    clean_I1, bad_IM = scores_IM[:, :1], scores_IM[:, [1 + cells.index(cell) for cell in known]]
    both_IM = ~np.isnan(clean_I1) & ~np.isnan(bad_IM)
    right_I1, right_IM = clean_I1 >= 0.5, bad_IM >= 0.5
    parts = {
        "right_to_wrong": right_I1 & ~right_IM,
        "wrong_to_right": ~right_I1 & right_IM,
        "answer_change_rate": _answer_changes(scores.records, known, items),
        "clean_right": np.broadcast_to(right_I1, bad_IM.shape),
    }
    stacked = np.concatenate([np.where(both_IM, part.astype(float), np.nan) for part in parts.values()], axis=1)
    columns = iter(column_means(stacked, images, resampling))
    drawn = {(name, cell): next(columns) for name in parts for cell in known}
    quantity = {key: one for key, one in drawn.items() if one.value is not None}
    exact = set(np.unique(scores_IM[~np.isnan(scores_IM)])) <= {0.0, 1.0}
    sign_p = sign_flip_tests(bad_IM - clean_I1, images, seed=resampling.seed, n_draws=resampling.n_draws)
    by_cell: dict[Cell, dict[str, object]] = {}
    for j, cell in enumerate(known):
        lost, gained = (int((parts[name] & both_IM)[:, j].sum()) for name in ("right_to_wrong", "wrong_to_right"))
        by_cell[cell] = {
            "n_paired": int(both_IM[:, j].sum()),
            "right_to_wrong": lost,
            "wrong_to_right": gained,
            "answer_change_rate": drawn["answer_change_rate", cell].to_json(),
            "mcnemar_p": mcnemar(lost, gained) if exact else None,
            "sign_flip_p": sign_p[j],
        }
    for cell, adjusted in zip(known, holm(sign_p), strict=True):
        by_cell[cell]["sign_flip_p_holm"] = adjusted
    exact_p = [p for cell in known if isinstance(p := by_cell[cell]["mcnemar_p"], float)]
    for cell, value in zip(known, holm(exact_p) if exact else [None] * len(known), strict=True):
        by_cell[cell]["mcnemar_p_holm"] = value
    total = {
        name: mean([quantity[name, c] for c in known if c[0] in headline and (name, c) in quantity]) for name in parts
    }
    summary: dict[str, object] = {
        "flip_rate": weighted_sum([total["right_to_wrong"], total["wrong_to_right"]], [1.0, 1.0]).to_json(),
        "right_to_wrong": total["right_to_wrong"].to_json(),
        "wrong_to_right": total["wrong_to_right"].to_json(),
        "lost_of_clean_right": ratio(
            total["right_to_wrong"], total["clean_right"], name="share of clean-right items"
        ).to_json(),
        "answer_change_rate": total["answer_change_rate"].to_json(),
    }
    return summary, by_cell


def _answer_changes(records: Mapping[Cell, CellRecords], cells: Sequence[Cell], items: Sequence[str]) -> np.ndarray:
    clean = dict(zip(records[CLEAN].item_ids, records[CLEAN].answers, strict=True))
    changes = np.zeros((len(items), len(cells)), dtype=bool)
    for column, cell in enumerate(cells):
        here = dict(zip(records[cell].item_ids, records[cell].answers, strict=True))
        changes[:, column] = [here.get(item) != clean.get(item) for item in items]
    return changes
