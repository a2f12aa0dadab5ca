"""The routing of one cell while it is answered: stored if the cell is clean, else compared with the clean one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.routing.drift import aligned, drift_figures, drift_sums, token_changes
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
        item_T = np.repeat(np.arange(len(items)), prompts.lengths)
        facts: list[Facts] = [{} for _ in items]
        for kind, chosen_T in zip(MODALITIES, (prompts.is_image_T, ~prompts.is_image_T), strict=True):
            tokens_I = np.bincount(item_T[chosen_T], minlength=len(items))
            means = {
                name: np.bincount(item_T[chosen_T], values_T[chosen_T], minlength=len(items)) / np.maximum(tokens_I, 1)
                for name, values_T in by_token.items()
            }
            for row, tokens in enumerate(tokens_I.tolist()):
                if tokens:
                    facts[row][kind] = {"tokens": tokens} | {name: _number(v[row]) for name, v in means.items()}
        return facts


class DriftRouting:
    """Compares the routing of a corrupted cell's prompts with that of the clean ones."""

    def __init__(self, folder: Path, cell: Cell, rank: int) -> None:
        self._clean = ShardReader(shard_paths(folder, clean_stem(cell)))
        self._writer = ShardWriter(folder, stem_of(cell), rank)

    def add(self, items: Sequence[str], prompts: RoutedPrompts) -> list[Facts]:
        """Writes the drift of a batch; returns for each item what its record says of it."""
        facts: list[Facts] = [{} for _ in items]
        pairs: dict[int, RoutedPrompts] = {}
        # By file, so that each is read once.
        known = [row for row, item in enumerate(items) if item in self._clean]
        for row in sorted(known, key=lambda row: (self._clean.path_of(items[row]), row)):
            clean = RoutedPrompts.from_arrays(self._clean.read(items[row]))
            reason = aligned(clean, prompts.take([row]))
            if reason is None:
                pairs[row] = clean
            facts[row] = {"comparable": reason is None} | ({} if reason is None else {"reason": reason})
        for row in set(range(len(items))) - set(known):
            facts[row] = {"comparable": False, "reason": "the clean prompt has no routing, for the item failed"}
        rows = sorted(pairs)
        if rows:
            clean, corrupted = RoutedPrompts.concatenate([pairs[row] for row in rows]), prompts.take(rows)
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
    figures = {name: values_ILM.mean(1) for name, values_ILM in drift_figures(sums).items() if name in RECORDED}
    present_IM = sums["tokens"][:, 0] > 0
    return [
        {
            kind: {name: _number(figures[name][row, m]) for name in RECORDED}
            for m, kind in enumerate(MODALITIES)
            if present[m]
        }
        for row, present in enumerate(present_IM.tolist())
    ]


def _number(value: Any) -> float | None:
    """Six digits: below them is what 16-bit scores leave out. None for what is not defined."""
    return None if np.isnan(value) else round(float(value), 6)
