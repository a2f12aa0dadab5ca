"""Attacked cells in the report: figures paired with the cell without the attack, tables of their own, warnings.

They are in no mean over corruptions, in no severity curve and in no comparison of two models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from symphony_vlm.evaluation.quantities import Quantity, difference, ratio
from symphony_vlm.evaluation.report_data import ReportData
from symphony_vlm.evaluation.report_tables import Entry, Table, entry, p_text
from symphony_vlm.evaluation.robustness import Cell, CellRecords, ModelScores, Resampling
from symphony_vlm.evaluation.statistics import Floats, holm, mcnemar, resampled_means, sign_flip_tests

__all__ = ["attack_figures", "attack_tables", "attack_warnings"]

Json = Mapping[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class _Paired:
    """Items that have a score with and without the attack."""

    before_I: Floats
    after_I: Floats
    images: list[str]


def attack_figures(data: ReportData, resampling: Resampling) -> list[Row]:
    """For each model, task and attacked cell: mean item scores without and with the attack, and their difference.

    The cell without the attack has the same corruption and severity. Right means a score of at least 0.5. The family
    of Holm's correction is all attacked cells of a model and a task.
    """
    figures: list[Row] = []
    for scores in data.scores:
        mine = [_figure(scores, *key, found, resampling) for key, found in _attacked_cells(data, scores)]
        known = [figure for figure in mine if figure.get("sign_flip_p") is not None]
        for figure, adjusted in zip(known, holm([f["sign_flip_p"] for f in known]), strict=True):
            figure["sign_flip_p_holm"] = adjusted
        figures += mine
    return figures


def attack_tables(data: ReportData, figures: Sequence[Json]) -> list[Table]:
    """A table of paired differences and one of the tasks' and attacks' own figures, for each task."""
    tables: list[Table] = []
    for task in dict.fromkeys(figure["task"] for figure in figures):
        mine = [figure for figure in figures if figure["task"] == task]
        tables.append(_paired_table(task, mine))
        tables.append(_own_table(task, data))
    return tables


def attack_warnings(data: ReportData) -> Iterator[str]:
    """Items that failed under attack."""
    failed: dict[tuple[str, str], int] = {}
    for row in data.attacked_rows:
        key = row["task"], row["attack"]
        failed[key] = max(failed.get(key, 0), row.get("n_errors") or 0)
    for (task, attack), count in failed.items():
        if count:
            yield f"{task} under {attack}: up to {count} items of a cell ended in an error and are in no figure."


def _attacked_cells(data: ReportData, scores: ModelScores) -> Iterator[tuple[tuple[Cell, str], CellRecords]]:
    model = next(model for model in data.models if model.label == scores.label)
    for evaluation in model.evaluations:
        if {(row["model"], row["router"] or "none") for row in evaluation.document["results"]} == {
            (model.model, model.router)
        }:
            for (task, split, cell, attack), records in evaluation.attacked_records.items():
                if scores.task in (task, f"{task}/{split}"):
                    yield (cell, attack), records


def _figure(scores: ModelScores, cell: Cell, attack: str, records: CellRecords, resampling: Resampling) -> Row:
    figure: Row = {
        "label": scores.label,
        "model": scores.model,
        "router": scores.router,
        "task": scores.task,
        "corruption": cell[0],
        "severity": cell[1],
        "attack": attack,
    }
    paired = _paired(scores.records.get(cell), records)
    if paired is None:
        reason = "no item has a score in this cell and in the one without the attack"
        names = ("without", "attacked", "difference", "right_to_wrong", "wrong_to_right", "lost_of_right")
        missing = {name: Quantity(value=None, reason=reason).to_json() for name in names}
        return figure | {"n_items": 0, "mcnemar_p": None, "sign_flip_p": None} | missing
    return figure | _compared(paired, resampling)


def _paired(clean: CellRecords | None, attacked: CellRecords) -> _Paired | None:
    if clean is None:
        return None
    before = dict(zip(clean.item_ids, clean.scores, strict=True))
    rows = [
        (before[item], score, image)
        for item, score, image in sorted(zip(attacked.item_ids, attacked.scores, attacked.images, strict=True))
        if item in before and not np.isnan(before[item]) and not np.isnan(score)
    ]
    if not rows:
        return None
    first, second, images = zip(*rows, strict=True)
    return _Paired(np.array(first), np.array(second), list(images))


def _compared(paired: _Paired, resampling: Resampling) -> Row:
    before, after = paired.before_I, paired.after_I
    right, stays = before >= 0.5, after >= 0.5
    columns = {
        "without": before,
        "attacked": after,
        "right_to_wrong": (right & ~stays).astype(float),
        "wrong_to_right": (~right & stays).astype(float),
        "right": right.astype(float),
    }
    values, replicates = resampled_means(
        np.stack(list(columns.values()), axis=1),
        paired.images,
        seed=resampling.seed,
        n_resamples=resampling.n_resamples,
    )
    found = {name: Quantity(value=float(values[i]), replicates=replicates[:, i]) for i, name in enumerate(columns)}
    (p,) = sign_flip_tests((after - before)[:, None], paired.images, seed=resampling.seed, n_draws=resampling.n_draws)
    exact = set(np.unique([before, after])) <= {0.0, 1.0}
    lost = ratio(found["right_to_wrong"], found.pop("right"), name="share of items right without the attack")
    return {
        "n_items": len(before),
        "n_images": len(set(paired.images)),
        **{name: quantity.to_json() for name, quantity in found.items()},
        "difference": difference(found["without"], found["attacked"]).to_json(),
        "lost_of_right": lost.to_json(),
        "mcnemar_p": mcnemar(int((right & ~stays).sum()), int((~right & stays).sum())) if exact else None,
        "sign_flip_p": p,
    }


def _cell_name(row: Json) -> str:
    under = "clean" if row["corruption"] == "none" else f"{row['corruption'].replace('_', ' ')} {row['severity']}"
    return f"{row['attack']} on {under}"


def _paired_table(task: str, figures: Sequence[Json]) -> Table:
    several = len({figure["label"] for figure in figures}) > 1
    rows = [
        (
            Entry(main=_cell_name(figure) + (f", {figure['label']}" if several else "")),
            Entry(main=str(figure["n_items"])),
            entry(figure["without"]),
            entry(figure["attacked"]),
            entry(figure["difference"], signed=True),
            entry(figure["lost_of_right"]),
            entry(figure["wrong_to_right"]),
            Entry(main=p_text(figure["mcnemar_p"])),
            Entry(main=p_text(figure["sign_flip_p"])),
            Entry(main=p_text(figure.get("sign_flip_p_holm"))),
        )
        for figure in sorted(
            figures, key=lambda f: (f["attack"], f["corruption"] != "none", f["corruption"], f["severity"])
        )
    ]
    return Table(
        key="attacks",
        title=f"Attacks: {task}",
        caption=(
            "Mean scores of the items that both cells hold, in %, with 95 % intervals over images; the difference is "
            "paired with the same pictures without the attack. Lost: right without the attack and wrong under it, of "
            "those right without. p: exact McNemar (where scores are 0 or 1), sign flips of whole images, and the "
            "latter after Holm's correction over a model's attacked cells. In no mean over corruptions."
        ),
        header=(
            *("attack", "items", "without", "attacked", "difference", "lost", "gained"),
            *("p (McNemar)", "p (images)", "p (Holm)"),
        ),
        rows=tuple(rows),
    )


def _own_table(task: str, data: ReportData) -> Table:
    labels = {(model.model, model.router): model.label for model in data.models}
    mine = [row for row in data.attacked_rows if task in (row["task"], f"{row['task']}/{row.get('split')}")]
    several = len({(row["model"], row["router"]) for row in mine}) > 1
    lines = []
    for row in mine:
        scale = 100.0 if row.get("scale", 1.0) == 1.0 else 1.0
        label = labels[row["model"], row["router"] or "none"]
        name = _cell_name(row) + (f", {label}" if several else "")
        lines.append(
            (Entry(main=name), Entry(main=row["metric"]), Entry(main=str(row.get("n_items"))), entry(row, scale=scale))
        )
    return Table(
        key="attacks",
        title=f"Figures under attack: {task}",
        caption="The task's own figures under attack, then what the attack adds (docs/attacks.md); 95 % intervals.",
        header=("attack", "figure", "items", "value"),
        rows=tuple(lines),
    )
