"""Lists of faulty records, as ``symphony-vlm data check`` writes them, read as records to leave out."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from symphony_vlm.errors import InputError
from symphony_vlm.text import nearest

__all__ = ["check_range", "read_skip_lists"]

_REMEDY = (
    'Each line is an object with "file" (the data file), "index" (from 0), "id" and "reason", as '
    "`symphony-vlm data check` writes it."
)


def read_skip_lists(paths: Sequence[Path], sources: Mapping[str, str]) -> dict[str, set[int]]:
    """Which records to leave out, by source.

    Args:
        paths: JSON lines; of each ``file`` and ``index`` are used.
        sources: path as the recipe gives it, by the source's label. ``file`` may be the label, the path, or the last
            part of either.

    Raises:
        InputError: a list cannot be read, a line is malformed, or its ``file`` is none of the sources or several.
    """
    left_out: dict[str, set[int]] = {label: set() for label in sources}
    for path in paths:
        for where, entry in _entries(path):
            left_out[_label(entry["file"], sources, where)].add(entry["index"])
    return left_out


def check_range(left_out: Collection[int], num_records: int, label: str) -> None:
    """Refuses indices that a source does not have.

    Raises:
        InputError: an index is not below the number of records.
    """
    beyond = [index for index in left_out if index >= num_records]
    if beyond:
        raise InputError(
            f"index {min(beyond)} is listed for {label}, which has {num_records} records",
            where="data.skip",
            remedy="The list belongs to another version of the file: run `symphony-vlm data check` again.",
        )


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", where=f"data.skip {str(path)!r}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path.name}: line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"is not valid JSON: {error}", where=where, remedy=_REMEDY) from error
        index = entry.get("index") if isinstance(entry, dict) else None
        if not isinstance(index, int) or isinstance(index, bool) or index < 0 or not isinstance(entry.get("file"), str):
            raise InputError(f"is {line.strip()[:80]}, which names no record", where=where, remedy=_REMEDY)
        yield where, entry


def _label(file: str, sources: Mapping[str, str], where: str) -> str:
    exact = [label for label, path in sources.items() if file in (label, path)]
    found = exact or [
        label for label, path in sources.items() if PurePath(file).name in (PurePath(path).name, PurePath(label).name)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"{file!r} may be any of {', '.join(found)}", where=where, remedy="Write one of these names as its file."
        )
    raise InputError(
        f"{file!r} is none of the data files{nearest(file, sources)}",
        where=where,
        remedy=f"Data files: {', '.join(sources)}.",
    )
