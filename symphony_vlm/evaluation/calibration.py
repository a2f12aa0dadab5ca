"""What the parts of an evaluation cost here and now: a few pictures opened in every cell, some questions answered."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from symphony_vlm.evaluation.cell import IMAGES_AT_ONCE, answer_items
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.pictures import OpenedPictures
from symphony_vlm.evaluation.predictor import AnswersItems
from symphony_vlm.evaluation.processes import Processes
from symphony_vlm.evaluation.subset import pictures_in_order

__all__ = ["Costs", "Items", "measure_costs"]

Items = Mapping[str, Sequence[EvaluationItem]]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds that the parts of an evaluation take in one process."""

    opening: Mapping[str, float]
    """Of one picture, opened and corrupted, by the cell's file name."""
    answering: Mapping[str, float]
    """Of one question, pictures encoded and all models asked, by task."""


def measure_costs(
    cells: Sequence[Cell],
    items: Items,
    predictors: Callable[[Cell], Sequence[AnswersItems]],
    *,
    seconds: float,
    seed: int,
    batch_size: int,
    processes: Processes,
    after_chunk: Callable[[], None],
) -> Costs:
    """Opens the first pictures of the seeded order in every cell, and answers their questions in some.

    Args:
        cells: of the whole plan.
        items: of each task.
        predictors: all models, ready for a cell's task.
        seconds: about how long it may take.
        seed: of the order of pictures and cells.
        batch_size: questions answered together.
        processes: each measures at the same time as the others, as it will be.
        after_chunk: called when pictures are no longer needed.
    """
    order = random.Random(seed).sample(list(cells), len(cells))
    pictures = {
        name: [group for group in pictures_in_order(listed, seed) if processes.owns(group[0])]
        for name, listed in items.items()
    }
    opening = _measure_opening(order, pictures, predictors, seconds / 2)
    answering: dict[str, float] = {}
    for name, groups in pictures.items():
        mine = [cell for cell in order if cell.task.name == name]
        share = seconds / 2 / len(pictures)
        answering[name] = _measure_answering(mine, groups, predictors, share, batch_size, after_chunk)
    return Costs(opening=opening, answering=answering)


def _measure_opening(
    order: Sequence[Cell],
    pictures: Mapping[str, Sequence[Sequence[EvaluationItem]]],
    predictors: Callable[[Cell], Sequence[AnswersItems]],
    seconds: float,
) -> dict[str, float]:
    """Each cell once, then again while there is time; the first picture opened at all is not counted."""
    taken: dict[str, list[float]] = {cell.file_name: [] for cell in order}
    begin = time.monotonic()
    for group in pictures[order[0].task.name][:1]:
        _open(OpenedPictures(order[0]), group[:1], predictors(order[0]))
    for number in range(4):
        for cell in order:
            groups = pictures[cell.task.name]
            if not groups or (number and time.monotonic() - begin > seconds):
                continue
            models = predictors(cell)
            start = time.monotonic()
            _open(OpenedPictures(cell), groups[number % len(groups)][:1], models)
            taken[cell.file_name].append(time.monotonic() - start)
    return {name: sum(times) / len(times) if times else 0.0 for name, times in taken.items()}


def _measure_answering(
    cells: Sequence[Cell],
    groups: Sequence[Sequence[EvaluationItem]],
    predictors: Callable[[Cell], Sequence[AnswersItems]],
    seconds: float,
    batch_size: int,
    after_chunk: Callable[[], None],
) -> float:
    """Seconds a question. Chunks grow to the evaluation's own while there is time: large ones are cheaper."""
    if not groups:
        return 0.0
    # The clean cell, then corrupted ones.
    cells = sorted(cells, key=lambda cell: cell.severity > 0)
    size = max(1, round(batch_size / (sum(map(len, groups)) / len(groups))))
    begin, taken, cell_number, warm = time.monotonic(), 0.0, 0, False
    measured: list[tuple[int, float]] = []
    while len(measured) < 2 or (time.monotonic() - begin + 2 * taken < seconds and len(measured) < len(cells) + 2):
        cell = cells[cell_number % len(cells)]
        chunk = [item for group in groups[: min(size, IMAGES_AT_ONCE)] for item in group]
        taken = _answer(cell, chunk, predictors(cell), batch_size)
        after_chunk()
        if warm:
            measured.append((len(chunk), taken))
            size *= 2
            cell_number += 1
        warm = True  # what is done first is slower: memory, caches, threads
    largest = max(count for count, _ in measured)
    alike = [(count, seconds) for count, seconds in measured if 2 * count >= largest]
    return sum(seconds for _, seconds in alike) / sum(count for count, _ in alike)


def _answer(cell: Cell, items: Sequence[EvaluationItem], predictors: Sequence[AnswersItems], batch_size: int) -> float:
    opened = OpenedPictures(cell)
    _open(opened, items, predictors)
    start = time.monotonic()
    for predictor in predictors:
        answer_items(cell, items, predictor, batch_size=batch_size, opened=opened)
    return time.monotonic() - start


def _open(opened: OpenedPictures, items: Sequence[EvaluationItem], predictors: Sequence[AnswersItems]) -> None:
    """As the evaluation does: once for all models, but where each decides what is corrupted."""
    for item in items:
        for predictor in predictors:
            opened.of(item, predictor)
