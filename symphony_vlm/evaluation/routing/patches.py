"""Which patches of a picture changed their experts: a few samples, chosen by rule, for the report to draw.

Shape letters: P patches of a picture.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.pictures import open_picture
from symphony_vlm.evaluation.records import Record, read_records
from symphony_vlm.evaluation.routing.cell_routing import is_clean, stem_of
from symphony_vlm.evaluation.routing.shards import load_whole, take_items
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["patch_grid", "patch_samples"]

SAMPLES = 4
LARGEST = 224
"""Side of a drawn picture in pixels."""


def patch_grid(model: SymphonyVLMForConditionalGeneration) -> int | None:
    """Side of the square of patches that a picture's tokens are, row after row; None if they are something else."""
    side = isqrt(model.config.num_image_tokens)
    return side if model.tile_grid is None and side * side == model.config.num_image_tokens else None


def patch_samples(
    model: SymphonyVLMForConditionalGeneration,
    cells: Sequence[Cell],
    items: Sequence[EvaluationItem],
    output: Path,
    slots: int,
) -> list[dict[str, Any]]:
    """Up to four items of different corruptions, those whose answer flips to wrong first, smallest hash first.

    Args:
        model: with its processor.
        cells: of one task, answered and merged.
        items: of the task.
        output: the evaluation's folder.
        slots: L K, experts of a token over all layers.

    Returns:
        Each: the cell, the question, both answers, ``grid``, ``changed`` (for each patch the share of its experts that
        differ) and both pictures as the model sees them, PNG in base64. Empty if patches have no place in a picture.
    """
    grid = patch_grid(model)
    if grid is None:
        return []
    clean = next(cell for cell in cells if is_clean(cell))
    before = _records(output, clean)
    by_id = {item.id: item for item in items}
    found: list[tuple[tuple[bool, str], Cell, Record, np.ndarray]] = []
    for cell in cells:
        if cell.severity and cell.attack == "none":
            choice = _first_of_cell(cell, output, before, by_id, grid * grid)
            found.extend([] if choice is None else [choice])
    chosen: list[dict[str, Any]] = []
    for _, cell, record, changes_P in sorted(found, key=lambda one: one[0]):
        used = {(sample["corruption"], sample["item_id"]) for sample in chosen}
        new = all(cell.corruption != name and record["item_id"] != item for name, item in used)
        if new and len(chosen) < SAMPLES:
            first = before[record["item_id"]]
            pictures = {
                name: _shown(model, by_id[record["item_id"]], kind)
                for name, kind in (("clean_png", clean), ("corrupted_png", cell))
            }
            facts = {name: record[name] for name in ("corruption", "severity", "item_id", "question", "answer")}
            answers = {"clean": first["prediction"], "corrupted": record["prediction"]}
            scores = {"clean_score": first["score"], "corrupted_score": record["score"]}
            changed = [round(float(share), 4) for share in changes_P / slots]
            chosen.append({**facts, **answers, **scores, "grid": grid, "changed": changed, **pictures})
    return chosen


def _first_of_cell(
    cell: Cell, output: Path, before: Mapping[str, Record], items: Mapping[str, EvaluationItem], n_patches: int
) -> tuple[tuple[bool, str], Cell, Record, np.ndarray] | None:
    """The item of a cell to be shown: its key for sorting, the cell, its record, and the changes of its patches."""
    routed, arrays = load_whole(output / "routing", stem_of(cell))
    records = _records(output, cell)
    found = []
    for row, item in enumerate(routed):
        if item in records and item in items and len(items[item].images) == 1 and arrays["lengths"][row] == n_patches:
            lost = (before[item]["score"] or 0) >= 0.5 and (records[item]["score"] or 0) < 0.5
            digest = hashlib.sha256(f"{item}\n{cell.corruption}\n{cell.severity}".encode()).hexdigest()
            found.append(((not lost, digest), row, item))
    if not found:
        return None
    key, row, item = min(found)
    changes = {name: arrays[name] for name in ("lengths", "image_changes_T")}
    return key, cell, records[item], take_items(changes, [row])["image_changes_T"]


def _shown(model: SymphonyVLMForConditionalGeneration, item: EvaluationItem, cell: Cell) -> str:
    """The picture as the model sees it, no larger than it will be drawn."""
    assert model.processor is not None
    pixels = open_picture(item.images[0], cell).pixels
    square = Image.fromarray(model.processor.image_processor.prepare(Image.fromarray(pixels)))
    square.thumbnail((LARGEST, LARGEST), Image.Resampling.BOX)
    stream = io.BytesIO()
    square.save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


def _records(output: Path, cell: Cell) -> dict[str, Record]:
    return {record["item_id"]: record for record in read_records(output / "predictions" / cell.file_name)}
