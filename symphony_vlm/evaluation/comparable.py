"""Whether two evaluations may be compared item by item, and the one clear error if not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.cell_records import CLEAN, Cell
from symphony_vlm.evaluation.report_data import Evaluation, read_lines

__all__ = ["check_comparable"]

_SETTINGS = ("seed", "corrupt_at", "corruption_scheme")
"""Of the manifest: what the corrupted pixels depend on."""


def check_comparable(first: Evaluation, second: Evaluation) -> list[str]:
    """Checks that both evaluations asked the same questions about the same pixels.

    Returns:
        What both hold: names of tasks, sorted.

    Raises:
        InputError: A folder has no predictions or several models; the two have no task in common, or no question in
            common; they asked something else under the same id; they corrupt with another seed, scheme or at another
            size; or an item was shown with other pixels.
    """
    for evaluation in (first, second):
        _check_one(evaluation)
    tasks = sorted({key[0] for key in first.records} & {key[0] for key in second.records})
    if not tasks:
        ours, theirs = (sorted({key[0] for key in e.records}) for e in (first, second))
        raise InputError(
            f"it holds {', '.join(theirs)}, and {first.folder} holds {', '.join(ours)}: no task in common",
            where=str(second.folder),
            remedy="Evaluate both models on the same task.",
        )
    _check_settings(first, second)
    for task in tasks:
        _check_task(first, second, task)
    return tasks


def _check_one(evaluation: Evaluation) -> None:
    where = str(evaluation.folder)
    if not evaluation.records:
        remedy = "Keep predictions/ beside results.json: a paired comparison needs every answer."
        raise InputError("no predictions here", where=where, remedy=remedy)
    owners = {(row["model"], row["router"]) for row in evaluation.document["results"]}
    if len(owners) > 1:
        raise InputError(
            f"it holds {len(owners)} models; a comparison is of two evaluations of one model each",
            where=where,
            remedy="For several models in one page use symphony-vlm report.",
        )


def _check_settings(first: Evaluation, second: Evaluation) -> None:
    for name in _SETTINGS:
        ours, theirs = (e.manifest.get(name) for e in (first, second))
        if ours is not None and theirs is not None and ours != theirs:
            raise InputError(
                f"'{name}' is {theirs!r}, and {ours!r} in {first.folder / 'manifest.json'}",
                where=str(second.folder / "manifest.json"),
                remedy=f"Evaluate both with the same {name}: other pictures are no pair.",
            )
    ours, theirs = (_provenance(e).get("corruption_canary") for e in (first, second))
    if ours and theirs and ours != theirs:
        raise InputError(
            "its corruptions draw other pixels (provenance: corruption_canary)",
            where=str(second.folder / "results.json"),
            remedy=f"Evaluate both with the same version; {first.folder} has another canary.",
        )


def _check_task(first: Evaluation, second: Evaluation, task: str) -> None:
    sides = (first, second)
    cells = sorted(set.intersection(*({cell for name, _, cell in e.records if name == task} for e in sides)))
    if not cells:
        raise InputError(
            f"no cell of {task} in common with {first.folder}",
            where=str(second.folder),
            remedy="Evaluate both with the same --corruption and --severity.",
        )
    for cell in cells:
        ours, theirs = (_pixels(e, task, cell) for e in sides)
        common = ours.keys() & theirs.keys()
        if not common:
            raise InputError(
                f"no question of {_name(task, cell)} in common with {first.folder}",
                where=str(second.folder),
                remedy="Evaluate both on the same data, with the same --limit and --seed.",
            )
        different = sorted(item for item in common if ours[item] and theirs[item] and ours[item] != theirs[item])
        if different:
            raise InputError(
                f"{len(different)} of {len(common)} items of {_name(task, cell)} were shown with other pixels than in "
                f"{first.folder} (the first: {different[0]!r})",
                where=str(second.folder),
                remedy="Evaluate both on the same pictures, with the same --seed.",
            )
    asked, answered = (_questions(e, task, cells[0]) for e in sides)
    for item in sorted(asked.keys() & answered.keys()):
        if asked[item] != answered[item]:
            raise InputError(
                f"item {item!r} of {task} asks {answered[item]!r}, and {asked[item]!r} in {first.folder}",
                where=str(second.folder),
                remedy="Evaluate both on the same data.",
            )


def _pixels(evaluation: Evaluation, task: str, cell: Cell) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for (name, _, other), records in evaluation.records.items():
        if (name, other) == (task, cell):
            found.update(zip(records.item_ids, records.pixels, strict=True))
    return found


def _questions(evaluation: Evaluation, task: str, cell: Cell) -> dict[str, tuple[Any, Any]]:
    def lines() -> Iterator[dict[str, Any]]:
        path = evaluation.files.get((task, cell))
        return read_lines(path) if path is not None else iter(())

    return {str(r["item_id"]): (r.get("question"), r.get("answer")) for r in lines() if r.get("task") == task}


def _name(task: str, cell: Cell) -> str:
    return f"{task}, clean" if cell == CLEAN else f"{task}, {cell[0]} {cell[1]}"


def _provenance(evaluation: Evaluation) -> dict[str, Any]:
    found = evaluation.document.get("provenance")
    return found if isinstance(found, dict) else {}
