"""Raw records of a ``.json`` list or a ``.jsonl`` file, each parsed when it is asked for.

Only the place of each record is kept (24 bytes), never the text: a million records are opened and walked in the memory
of an empty program, and worker processes share the index.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from array import array
from pathlib import Path
from typing import Any, BinaryIO

from symphony_vlm.data.file_slices import FileSlices
from symphony_vlm.data.json_list_scan import MAX_RECORD_BYTES, ListScanner, too_long
from symphony_vlm.errors import InputError

__all__ = ["JsonRecords", "describe_json_error", "read_json_lines", "read_json_list"]

_BLOCK = 2**20


class JsonRecords:
    """A sequence of JSON values inside one file.

    Args:
        slices: The file.
        fingerprint: sha256 of its bytes.
        spans: Start and end of each record in bytes, one after the other.
        lines: The line number of each record (JSON lines), or None (a list).
    """

    def __init__(self, *, slices: FileSlices, fingerprint: str, spans: array[int], lines: array[int] | None) -> None:
        self.fingerprint = fingerprint
        self._slices = slices
        self._spans = spans
        self._lines = lines

    def __len__(self) -> int:
        return len(self._spans) // 2

    def __getitem__(self, index: int) -> Any:
        start, end = self._spans[2 * index], self._spans[2 * index + 1]
        where = f"{self._slices.path.name}: {self.label(index)}"
        if end - start > MAX_RECORD_BYTES:
            raise too_long(where, end - start)
        try:
            return json.loads(self._slices.read(start, end).decode())
        except (ValueError, RecursionError) as error:  # only JSON lines: a list was parsed when it was opened
            if isinstance(error, InputError):
                raise
            raise InputError(
                describe_json_error(error),
                where=where,
                kind="invalid_json",
                remedy="Each line of a .jsonl file must be one complete record; name a JSON list .json.",
            ) from error

    def label(self, index: int) -> str:
        """How messages name the record: by line number from 1 (as editors count) or by its index from 0."""
        return f"record {index}" if self._lines is None else f"line {self._lines[index]}"


def read_json_list(path: Path) -> JsonRecords:
    """Open a file that is one JSON list, which is checked to its end.

    Raises:
        InputError: Not readable, not UTF-8, not valid JSON (with line and column), not a list, or with a record above
            `MAX_RECORD_BYTES`.
    """
    slices = FileSlices(path)
    try:
        with path.open("rb") as file:
            digest, start = _skip_mark(file, path)
            spans = ListScanner(file, name=path.name, digest=digest, start=start).spans()
    except OSError as error:
        raise InputError(f"cannot be read: {error}", where=str(path)) from error
    return JsonRecords(slices=slices, fingerprint=digest.hexdigest(), spans=spans, lines=None)


def read_json_lines(path: Path) -> JsonRecords:
    """Open a file with one JSON record a line; blank lines are passed over. A bad line is an error of that record only.

    Raises:
        InputError: Not readable, or UTF-16.
    """
    slices = FileSlices(path)
    try:
        with path.open("rb") as file:
            digest, start = _skip_mark(file, path)
            spans, lines = _line_spans(file, digest, start)
    except OSError as error:
        raise InputError(f"cannot be read: {error}", where=str(path)) from error
    return JsonRecords(slices=slices, fingerprint=digest.hexdigest(), spans=spans, lines=lines)


def describe_json_error(error: Exception) -> str:
    """What `json.loads` of decoded bytes had to complain about, with line and column as far as they are known."""
    if isinstance(error, UnicodeDecodeError):
        column = len(error.object[: error.start].decode(errors="replace")) + 1
        return f"is not UTF-8 text at column {column}: {error.reason} (byte {error.object[error.start]:#04x})"
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        return f"is not valid JSON at {line}column {error.colno}: {error.msg}"
    if isinstance(error, RecursionError):
        return "is not valid JSON: brackets are nested too deeply"
    return f"is not valid JSON: {error}"


def _skip_mark(file: BinaryIO, path: Path) -> tuple[hashlib._Hash, int]:
    """Pass over a UTF-8 byte order mark; returns the hash that has seen it, and where the text starts."""
    head = file.read(len(codecs.BOM_UTF8))
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError("is UTF-16 text", where=path.name, remedy="Save it as UTF-8.")
    if head == codecs.BOM_UTF8:
        return hashlib.sha256(head), len(head)
    file.seek(0)
    return hashlib.sha256(), 0


def _line_spans(file: BinaryIO, digest: hashlib._Hash, start: int) -> tuple[array[int], array[int]]:
    """Start and end of each line that is not blank, and its number. A line may be longer than a block."""
    spans, lines = array("q"), array("q")
    position, number, blank = start, 1, True
    while block := file.read(_BLOCK):
        digest.update(block)
        # Only at line feeds: U+2028 and others at which str.splitlines cuts may stand inside a JSON string.
        *ended, rest = block.split(b"\n")
        for piece in ended:
            position += len(piece)
            if not blank or (piece and not piece.isspace()):
                spans.extend((start, position))
                lines.append(number)
            position += 1
            start, number, blank = position, number + 1, True
        position += len(rest)
        blank = blank and (not rest or rest.isspace())
    if not blank:
        spans.extend((start, position))
        lines.append(number)
    return spans, lines
