"""Loss of format under corruption, apart from loss of sight.

An answer of which the official rule makes nothing is wrong whatever the model has seen. Two figures tell how much of a
drop is that: the share of unparsed answers, and the drop by the official rule minus the drop by the lenient one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from symphony_vlm.evaluation.cell_records import CLEAN, Cell, CellRecords
from symphony_vlm.evaluation.quantities import Quantity, Resampling, column_means, difference, mean
from symphony_vlm.evaluation.statistics import Floats

__all__ = ["UNPARSED", "format_figures"]

UNPARSED = frozenset({"unparsed", "empty", "ambiguous"})
"""Statuses that count as unparsed, as ``n_unparsed`` of results.json."""

_Figures = dict[str, object]


def format_figures(
    records: Mapping[Cell, CellRecords], cells: Sequence[Cell], headline: Collection[str], resampling: Resampling
) -> tuple[_Figures, dict[Cell, _Figures]]:
    """Unparsed rates and format loss.

    Args:
        records: Of one model on one task, the clean cell among them.
        cells: Corrupted cells.
        headline: Corruptions that the means run over.
        resampling: Seed and number of resamples.

    Returns:
        ``{"unparsed_clean", "unparsed_rate", "unparsed_rise", "format_loss"}``, means over the cells of ``headline``,
        and by cell ``{"unparsed_rate", "format_loss"}``. ``format_loss`` is ``(official clean - official corrupted) -
        (lenient clean - lenient corrupted)`` over the items with all four scores; positive: the official rule loses
        more than the lenient one.
    """
    known = [cell for cell in cells if cell in records]
    unparsed = _unparsed(records, [CLEAN, *known], resampling)
    losses = _format_losses(records, known, resampling)
    by_cell: dict[Cell, _Figures] = {
        cell: {"unparsed_rate": unparsed[cell].to_json(), "format_loss": losses[cell].to_json()} for cell in known
    }
    counted = [cell for cell in known if cell[0] in headline]
    rate = mean([unparsed[cell] for cell in counted])
    summary: _Figures = {
        "unparsed_clean": unparsed[CLEAN].to_json(),
        "unparsed_rate": rate.to_json(),
        "unparsed_rise": difference(unparsed[CLEAN], rate).to_json(),
        "format_loss": mean([losses[cell] for cell in counted]).to_json(),
    }
    return summary, by_cell


def _unparsed(
    records: Mapping[Cell, CellRecords], cells: Sequence[Cell], resampling: Resampling
) -> dict[Cell, Quantity]:
    told = [cell for cell in cells if cell in records and records[cell].statuses]
    columns = {
        cell: np.array([float(status in UNPARSED) for status in records[cell].statuses], dtype=np.float64)
        for cell in told
    }
    missing = Quantity(value=None, reason="the records do not say how answers were parsed")
    return dict.fromkeys(cells, missing) | _means(records, columns, resampling)


def _format_losses(
    records: Mapping[Cell, CellRecords], cells: Sequence[Cell], resampling: Resampling
) -> dict[Cell, Quantity]:
    missing = Quantity(value=None, reason="the task has no lenient rule")
    clean = records.get(CLEAN)
    if clean is None or clean.lenient is None:
        return dict.fromkeys(cells, missing)
    # official - lenient of each item: the loss is the clean mean of it minus the corrupted one.
    gap = dict(zip(clean.item_ids, clean.scores - clean.lenient, strict=True))
    columns: dict[Cell, Floats] = {}
    for cell in cells:
        here = records[cell]
        if here.lenient is not None:
            before = np.array([gap.get(item, np.nan) for item in here.item_ids])
            columns[cell] = before - (here.scores - here.lenient)
    return dict.fromkeys(cells, missing) | _means(records, columns, resampling)


def _means(
    records: Mapping[Cell, CellRecords], columns: Mapping[Cell, Floats], resampling: Resampling
) -> dict[Cell, Quantity]:
    """Column means over the items of all cells together, under the weights that every other figure uses."""
    images = {
        item: image
        for cell in columns
        for item, image in zip(records[cell].item_ids, records[cell].images, strict=True)
    }
    if not images:
        return {}
    row_of = {item: row for row, item in enumerate(sorted(images))}
    values_IM = np.full((len(row_of), len(columns)), np.nan)
    for column, (cell, values) in enumerate(columns.items()):
        values_IM[[row_of[item] for item in records[cell].item_ids], column] = values
    drawn = column_means(values_IM, [images[item] for item in row_of], resampling)
    return dict(zip(columns, drawn, strict=True))
