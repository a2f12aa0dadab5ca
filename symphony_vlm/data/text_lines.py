"""Plain text, read line by line: text files as WikiText has them, tables and hub data sets with a column of text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from symphony_vlm.data.data_files import FILE_FORMATS, find_data_files
from symphony_vlm.data.hub import is_hub_id, open_hub_table
from symphony_vlm.data.tables import TableRows, fingerprint_of_files, open_saved_table, open_table_files
from symphony_vlm.errors import InputError

__all__ = ["TextLines", "articles", "open_lines", "read_lines"]

COLUMN = "text"
_TITLE = re.compile(r"\s*= (?:[^=\s]|[^=\s].*[^=\s]) =\s*").fullmatch


class TextLines:
    """Lines without their line ends, read anew each time they are gone through.

    Args:
        source: a UTF-8 text file, or a table with a column ``text`` of one line or more each.
        name: for messages.
    """

    def __init__(self, source: Path | TableRows, name: str) -> None:
        self._source = source
        self.name = name
        if isinstance(source, Path):
            self.fingerprint = fingerprint_of_files([source])
        else:
            self.fingerprint = source.fingerprint

    def __iter__(self) -> Iterator[str]:
        if isinstance(self._source, Path):
            yield from _lines_of_file(self._source)
            return
        for text in self._source.texts(COLUMN):
            # A row of WikiText on the hub is a line and has its line end with it.
            yield from (text or "").removesuffix("\n").split("\n")


def open_lines(path: str, *, subset: str | None = None, split: str | None = None) -> TextLines:
    """Opens a text file, a parquet or Arrow file, a folder of these, or a data set of the hub.

    Args:
        path: where it is, or ``organisation/name``.
        subset: which configuration of a hub data set.
        split: which split of a folder or hub data set.

    Raises:
        InputError: not there, or nothing that holds text.
    """
    place = Path(path).expanduser()
    if not place.exists():
        if not is_hub_id(path):
            raise InputError("does not exist", where=path, remedy=f"Relative paths start at {Path.cwd()}.")
        return TextLines(open_hub_table(path, subset=subset, split=split, any_columns=True), path)
    if place.is_file() and place.suffix.lower() not in FILE_FORMATS:
        if subset is not None or split is not None:
            raise InputError("is a text file; it has no subset or split", where=path, remedy="Leave them out.")
        return TextLines(place, place.name)
    file_format, files = find_data_files(place, split)
    if file_format == "saved":
        return TextLines(open_saved_table(files[0], any_columns=True), place.name)
    if file_format in ("parquet", "arrow"):
        return TextLines(open_table_files(place, files, file_format, any_columns=True), place.name)
    raise InputError(
        f"holds {file_format} records, not plain text",
        where=path,
        remedy=f"Give a text file, or a table with a column {COLUMN!r}.",
    )


def read_lines(path: str, *, subset: str | None = None, split: str | None = None) -> list[str]:
    """All lines at once, see `open_lines`.

    Raises:
        InputError: besides what `open_lines` refuses: no text in it.
    """
    lines = list(open_lines(path, subset=subset, split=split))
    if not any(line.strip() for line in lines):
        raise InputError("holds no text", where=path)
    return lines


def articles(lines: Sequence[str]) -> list[int]:
    """The article that each line belongs to, counted from 0; ``= Title =`` alone on a line begins one (WikiText).

    Lines before the first title are an article of their own if they hold any text.
    """
    numbers: list[int] = []
    current, has_text = 0, False
    for line in lines:
        if _TITLE(line):
            current += has_text
            has_text = True
        has_text = has_text or bool(line.strip())
        numbers.append(current)
    return numbers


def _lines_of_file(path: Path) -> Iterator[str]:
    number = 0
    try:
        # Only the line feed ends a line: WikiText has other characters that Python would take for line ends.
        with path.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                number += 1
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"is not UTF-8 text ({error.reason} after line {number})",
            where=str(path),
            remedy="Convert it, e.g. with iconv -t UTF-8.",
        ) from error
