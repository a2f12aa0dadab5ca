"""The block ``robustness.routing_drift`` of results.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from symphony_vlm.corruptions import COMMON
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.records import Record, read_records
from symphony_vlm.evaluation.routing.aggregate import ResampledFigures, counts_json, figures_json, resampled_figures
from symphony_vlm.evaluation.routing.association import flip_association
from symphony_vlm.evaluation.routing.cell_routing import is_clean, stem_of
from symphony_vlm.evaluation.routing.drift import drift_figures
from symphony_vlm.evaluation.routing.prompts import MODALITIES
from symphony_vlm.evaluation.routing.shards import load_whole

__all__ = ["N_RESAMPLES", "task_block"]

N_RESAMPLES = 1000
"""Of each cell: its figures are means over many tokens, and there are hundreds of them."""
ASSOCIATED = ("js_gate", "fluctuation")
"""Figures of an item, means over layers, that are related to flips."""


def task_block(cells: Sequence[Cell], output: Path, layers: Sequence[str], facts: dict[str, Any], *, seed: int) -> Any:
    """What the routers of one model did under all cells of one task.

    Args:
        cells: of the task, answered and merged.
        output: the evaluation's folder.
        layers: names of the sparse layers.
        facts: of the model, for the block.
        seed: of the bootstrap.
    """
    clean = next(cell for cell in cells if is_clean(cell))
    known = {record["item_id"]: record for record in _records(output, clean)}
    universe = sorted({record["image_key"] for record in known.values()})
    blocks: list[dict[str, Any]] = []

    def each() -> Iterator[ResampledFigures]:
        for cell in (cell for cell in cells if not is_clean(cell)):
            block, figures = _cell_block(cell, output, layers, known, universe, seed)
            blocks.append(block)
            if figures is not None and cell.corruption in COMMON and cell.attack == "none":
                yield figures

    mean = ResampledFigures.mean(each())
    return {
        **facts,
        "task": clean.task.name,
        "split": clean.task.split,
        "parameters": {"seed": seed, "n_resamples": N_RESAMPLES, "level": 0.95},
        "cells": blocks,
        "mean": None if mean is None else figures_json(mean, layers),
    }


def _cell_block(
    cell: Cell, output: Path, layers: Sequence[str], clean: dict[str, Record], universe: Sequence[str], seed: int
) -> tuple[dict[str, Any], ResampledFigures | None]:
    records = {record["item_id"]: record for record in _records(output, cell)}
    items, sums = load_whole(output / "routing", stem_of(cell))
    items_of_cell = [item for item in items if item in records]
    keep = [row for row, item in enumerate(items) if item in records]
    sums = {name: array[keep] for name, array in sums.items() if not name.endswith("_T") and name != "lengths"}
    block: dict[str, Any] = {
        "corruption": cell.corruption,
        "severity": cell.severity,
        "attack": cell.attack,
        "n_items": len(items_of_cell),
        "n_not_comparable": len(records) - len(items_of_cell),
    }
    if not items_of_cell:
        return block | {"n_images": 0, "layers": None, "counts": None, "association": []}, None
    images = [records[item]["image_key"] for item in items_of_cell]
    figures = resampled_figures(sums, images, universe, seed=seed, n_resamples=N_RESAMPLES)
    before, after = ([_score(known[item]) for item in items_of_cell] for known in (clean, records))
    association = _association(sums, np.array(before), np.array(after), images, seed)
    return (
        block
        | {
            "n_images": len(set(images)),
            "layers": figures_json(figures, layers),
            "counts": counts_json(sums, layers),
            "association": association,
        },
        figures,
    )


def _association(
    sums: dict[str, NDArray[Any]], before: NDArray[Any], after: NDArray[Any], images: Sequence[str], seed: int
) -> list[dict[str, Any]]:
    figures = drift_figures(sums)
    found = []
    for name in ASSOCIATED:
        for m, kind in enumerate(MODALITIES):
            drift_I = figures[name][..., m].mean(1)
            area = flip_association(drift_I, before, after, images, seed=seed, n_resamples=N_RESAMPLES)
            found.append({"drift": name, "modality": kind, **area})
    return found


def _records(output: Path, cell: Cell) -> list[Record]:
    return read_records(output / "predictions" / cell.file_name)


def _score(record: Record) -> float:
    return float("nan") if record["score"] is None else float(record["score"])
