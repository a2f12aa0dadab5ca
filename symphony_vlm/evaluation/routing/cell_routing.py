"""The routing of one cell while it is answered: stored if the cell is clean, else compared with the clean one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.routing.drift import drift_figures, drift_sums, misaligned, token_changes
from symphony_vlm.evaluation.routing.measures import entropy, normalized, rank_margin
from symphony_vlm.evaluation.routing.prompts import MODALITIES, RoutedPrompts
from symphony_vlm.evaluation.routing.shards import ShardReader, ShardWriter, shard_paths

__all__ = ["CleanRouting", "DriftRouting", "clean_stem", "is_clean", "stem_of"]

Facts = dict[str, Any]

RECORDED = ("js_gate", "fluctuation", "top1_change", "tv_weights", "entropy_change")
"""Figures in a record of a corrupted item, means over layers, for each modality."""


def is_clean(cell: Cell) -> bool:
    """Whether the other cells of its task are compared with this one."""
    return cell.severity == 0 and cell.attack == "none"


def clean_stem(cell: Cell) -> str:
    """Begin of the names of the files of the task's clean cell."""
    return f"{cell.task.name}.clean"


def stem_of(cell: Cell) -> str:
    """Begin of the names of the cell's files."""
    return clean_stem(cell) if is_clean(cell) else cell.file_name.removesuffix(".jsonl")


class CleanRouting:
    """Stores the routing of clean prompts."""

    def __init__(self, folder: Path, cell: Cell, rank: int) -> None:
        self._writer = ShardWriter(folder, stem_of(cell), rank)

    def add(self, items: Sequence[str], prompts: RoutedPrompts) -> list[Facts]:
        """Writes a batch; returns for each item what its record says of the routing."""
        self._writer.write(items, prompts.arrays())
        p_TLE = normalized(prompts.scores_TLE.astype(np.float32))
        margin_TL = rank_margin(p_TLE, prompts.num_selected)
        by_token = {"entropy": entropy(p_TLE).mean(1), "margin": margin_TL.mean(1)}
        facts: list[Facts] = [{} for _ in items]
        item_T = np.repeat(np.arange(len(items)), prompts.lengths)
        for kind, chosen_T in zip(MODALITIES, (prompts.is_image_T, ~prompts.is_image_T), strict=True):
            tokens_I = np.bincount(item_T[chosen_T], minlength=len(items))
            totals_I = [np.bincount(item_T[chosen_T], x_T[chosen_T], len(items)) for x_T in by_token.values()]
            rows = zip(facts, tokens_I.tolist(), *(total_I.tolist() for total_I in totals_I), strict=True)
            for fact, tokens, *totals in rows:
                if tokens:
                    values = (None if total != total else round(total / tokens, 6) for total in totals)
                    fact[kind] = {"tokens": tokens, **dict(zip(by_token, values, strict=True))}
        return facts


class DriftRouting:
    """Compares the routing of a corrupted cell's prompts with that of the clean ones."""

    def __init__(self, folder: Path, cell: Cell, rank: int) -> None:
        self._clean = ShardReader(shard_paths(folder, clean_stem(cell)))
        self._writer = ShardWriter(folder, stem_of(cell), rank)

    def add(self, items: Sequence[str], prompts: RoutedPrompts) -> list[Facts]:
        """Writes the drift of a batch; returns for each item what its record says of it."""
        facts: list[Facts] = [
            {"comparable": False, "reason": "the clean prompt has no routing, for the item failed"} for _ in items
        ]
        known = [row for row, item in enumerate(items) if item in self._clean]
        if not known:
            return facts
        clean = RoutedPrompts.from_arrays(self._clean.read([items[row] for row in known]))
        reasons = misaligned(clean, prompts.take(known))
        for row, reason in zip(known, reasons, strict=True):
            facts[row] = {"comparable": reason is None} | ({} if reason is None else {"reason": reason})
        rows = [row for row, reason in zip(known, reasons, strict=True) if reason is None]
        if rows:
            clean = clean.take([n for n, reason in enumerate(reasons) if reason is None])
            corrupted = prompts.take(rows)
            sums = drift_sums(clean, corrupted)
            self._writer.write([items[row] for row in rows], sums | _image_changes(clean, corrupted))
            for row, found in zip(rows, _recorded(sums), strict=True):
                facts[row] |= found
        return facts


def _image_changes(clean: RoutedPrompts, corrupted: RoutedPrompts) -> dict[str, NDArray[Any]]:
    """For a map of patches: `token_changes` of the image positions of each item."""
    item_T = np.repeat(np.arange(len(clean.lengths)), clean.lengths)
    return {
        "lengths": np.bincount(item_T[clean.is_image_T], minlength=len(clean.lengths)),
        "image_changes_T": token_changes(clean, corrupted)[clean.is_image_T],
    }


def _recorded(sums: dict[str, NDArray[Any]]) -> list[Facts]:
    """For each item the `RECORDED` figures by modality, means over the layers."""
    figures = drift_figures(sums)
    values_IMF = np.stack([figures[name].mean(1) for name in RECORDED], axis=-1)
    present_IM = sums["tokens"][:, 0] > 0
    return [
        {kind: facts for kind, facts, here in zip(MODALITIES, by_kind, present, strict=True) if here}
        for by_kind, present in zip(_numbers(values_IMF), present_IM.tolist(), strict=True)
    ]


def _numbers(values_IMF: NDArray[Any]) -> list[list[Facts]]:
    """Six digits: below them is what 16-bit scores leave out. None for what is not defined."""
    rounded = np.round(values_IMF.astype(np.float64), 6) + 0.0  # no -0
    known = np.where(np.isnan(rounded), None, rounded)  # type: ignore[call-overload]
    return [[dict(zip(RECORDED, row, strict=True)) for row in by_kind] for by_kind in known.tolist()]
