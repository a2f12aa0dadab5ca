"""Raw records of a ``.json`` list or a ``.jsonl`` file, each parsed when it is asked for.

The text is kept as one string with the place of each record in it: about a quarter of the memory of the parsed objects,
and worker processes forked from this one keep sharing it (counting references would copy millions of small objects).
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from pathlib import Path
from typing import Any

from symphony_vlm.errors import InputError

__all__ = ["JsonRecords", "read_json_lines", "read_json_list"]

_skip_space = re.compile(r"[ \t\n\r]*").match


class JsonRecords:
    """A sequence of JSON values inside one text.

    Args:
        name: The file, for messages.
        text: The whole file.
        fingerprint: sha256 of its bytes.
        spans: Start and end of each record, one after the other.
        lines: The line number of each record (JSON lines), or None (a list).
    """

    def __init__(self, *, name: str, text: str, fingerprint: str, spans: array[int], lines: array[int] | None) -> None:
        self.fingerprint = fingerprint
        self._name = name
        self._text = text
        self._spans = spans
        self._lines = lines

    def __len__(self) -> int:
        return len(self._spans) // 2

    def __getitem__(self, index: int) -> Any:
        start, end = self._spans[2 * index], self._spans[2 * index + 1]
        try:
            return json.loads(self._text[start:end])
        except (ValueError, RecursionError) as error:  # only JSON lines: a list was parsed when it was opened
            position = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise InputError(
                f"is not valid JSON{position}: {_reason(error)}",
                where=f"{self._name}: {self.label(index)}",
                kind="invalid_json",
                remedy="Each line of a .jsonl file must be one complete record; name a JSON list .json.",
            ) from error

    def label(self, index: int) -> str:
        """How messages name the record: by line number from 1 (as editors count) or by its index from 0."""
        return f"record {index}" if self._lines is None else f"line {self._lines[index]}"


def read_json_list(path: Path) -> JsonRecords:
    """Open a file that is one JSON list.

    Raises:
        InputError: Not readable, not UTF-8, not valid JSON (with line and column), or not a list.
    """
    text, fingerprint = _read_text(path)
    try:
        spans = _list_spans(text, path.name)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        position = f" at line {error.lineno} column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(
            f"is not valid JSON{position}: {_reason(error)}",
            where=path.name,
            remedy="Correct it there; a cut-off file must be written or downloaded again.",
        ) from error
    return JsonRecords(name=path.name, text=text, fingerprint=fingerprint, spans=spans, lines=None)


def read_json_lines(path: Path) -> JsonRecords:
    """Open a file with one JSON record a line; blank lines are passed over. A bad line is an error of that record only.

    Raises:
        InputError: Not readable or not UTF-8.
    """
    text, fingerprint = _read_text(path)
    spans, lines = array("q"), array("q")
    start = 0
    # Not str.splitlines, which also cuts at U+2028 and other characters that may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        end = start + len(line)
        if line.strip():
            spans.extend((start, end))
            lines.append(number)
        start = end + 1
    return JsonRecords(name=path.name, text=text, fingerprint=fingerprint, spans=spans, lines=lines)


def _read_text(path: Path) -> tuple[str, str]:
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig"), hashlib.sha256(content).hexdigest()
    except UnicodeDecodeError as error:
        raise InputError(
            f"is not UTF-8 text: {error.reason} at byte {error.start}", where=path.name, remedy="Save it as UTF-8."
        ) from error
    except OSError as error:
        raise InputError(f"cannot be read: {error}", where=str(path)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "brackets are nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _list_spans(text: str, name: str) -> array[int]:
    """Start and end of each element of the JSON list in ``text``, which is thereby checked to the end."""
    decoder = json.JSONDecoder()
    position = _after_space(text, 0)
    if text[position : position + 1] != "[":
        _refuse_other_top_level(decoder, text, position, name)
    spans = array("q")
    position = _after_space(text, position + 1)
    while text[position : position + 1] != "]" or spans:
        start = position
        _, position = decoder.raw_decode(text, start)
        spans.extend((start, position))
        position = _after_space(text, position)
        if text[position : position + 1] == "]":
            break
        if text[position : position + 1] != ",":
            raise json.JSONDecodeError("expecting ',' or ']'", text, position)
        position = _after_space(text, position + 1)
    end = _after_space(text, position + 1)
    if end != len(text):
        raise json.JSONDecodeError("extra data after the list", text, end)
    return spans


def _after_space(text: str, position: int) -> int:
    match = _skip_space(text, position)
    return match.end() if match else position


def _refuse_other_top_level(decoder: json.JSONDecoder, text: str, position: int, name: str) -> None:
    value, _ = decoder.raw_decode(text, position)
    kind = f"an object with the fields {', '.join(list(value)[:8])}" if isinstance(value, dict) else repr(value)[:60]
    raise InputError(
        f"begins with {kind}; a .json file must be one list of records",
        where=name,
        remedy="Put the records into [ ... ]; if there is one record a line, name the file .jsonl.",
    )
