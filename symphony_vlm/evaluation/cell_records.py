"""The items of one cell of an evaluation, in columns: what every figure of robustness is computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from symphony_vlm.evaluation.statistics import Floats

__all__ = ["CLEAN", "Cell", "CellRecords"]

Cell = tuple[str, int]
"""Corruption and severity."""
CLEAN: Cell = ("none", 0)


@dataclass(frozen=True, kw_only=True)
class CellRecords:
    """The items of one cell, one entry each."""

    item_ids: tuple[str, ...]
    images: tuple[str, ...]
    """The unit of clustering."""
    scores: Floats
    """``[I]``; NaN where an item has no score."""
    answers: tuple[str, ...]
    """The parsed answer, or the stripped text where nothing was parsed."""
    pixels: tuple[str | None, ...]
    """sha256 of the pixels the model was shown."""
    statuses: tuple[str, ...] = ()
    """What became of each answer (`ParseStatus`); empty where the records do not say."""
    lenient: Floats | None = None
    """``[I]`` scores by the forgiving rule, NaN where an item has none; None if no item has one."""

    def rows(self, rows: Sequence[int]) -> CellRecords:
        """The items in those rows."""
        return replace(
            self,
            item_ids=tuple(self.item_ids[row] for row in rows),
            images=tuple(self.images[row] for row in rows),
            scores=self.scores[list(rows)],
            answers=tuple(self.answers[row] for row in rows),
            pixels=tuple(self.pixels[row] for row in rows),
            statuses=tuple(self.statuses[row] for row in rows) if self.statuses else (),
            lenient=None if self.lenient is None else self.lenient[list(rows)],
        )
