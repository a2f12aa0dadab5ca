"""The places of the records in a JSON list that is too large to be held in memory, found while checking it to the end.

A window of text moves over the file. The standard decoder parses one record after the other in it; when one may go on
behind the window, the window at least doubles, so that the time stays linear in the size of the file however long the
records are.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from array import array
from typing import BinaryIO, NoReturn

from symphony_vlm.errors import InputError

__all__ = ["MAX_RECORD_BYTES", "ListScanner", "too_long"]

MAX_RECORD_BYTES = 64 * 2**20
"""Largest record, with any images inside it. A quote that is never closed must not pull a whole file into memory."""

_BLOCK = 2**20
_LONGEST_TOKEN = 16
"""More characters than any token but a string or a number has (``-Infinity``, ``\\ud83d\\ude00``): an error nearer
than this to the window's end may be the end's fault."""

_skip_space = re.compile(r"[ \t\n\r]*").match


class ListScanner:
    """Reads one JSON list from an open file.

    Args:
        file: Positioned at the start of the text.
        name: For messages.
        digest: Is fed every byte that is read.
        start: The byte at which the text starts.
        block: Bytes to read at a time, at least.
    """

    def __init__(
        self, file: BinaryIO, *, name: str, digest: hashlib._Hash, start: int = 0, block: int = _BLOCK
    ) -> None:
        self._file = file
        self._name = name
        self._digest = digest
        self._block = block
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._raw_decode = json.JSONDecoder().raw_decode
        self._text = ""
        self._at = 0  # in the window, in characters
        self._byte = start  # of the character at `_at`, in the file
        self._read = start  # bytes read so far
        self._line, self._column = 1, 1  # of the window's first character
        self._ended = False

    def spans(self) -> array[int]:
        """Start and end of each element in bytes, one after the other.

        Raises:
            InputError: Not UTF-8, not valid JSON (with line and column), not a list, or a record above the limit.
        """
        if self._next() != "[":
            self._refuse_other_top_level()
        self._advance(1)
        spans = array("q")
        if self._next() != "]":
            while True:
                self._element(spans)
                if (character := self._next()) == "]":
                    break
                if character != ",":
                    self._fail("expecting ',' or ']'", self._at)
                self._advance(1)
                self._next()
        self._advance(1)
        if self._next():
            self._fail("extra data after the list", self._at)
        return spans

    def _element(self, spans: array[int]) -> None:
        start = self._byte
        while True:
            try:
                _, end = self._raw_decode(self._text, self._at)
                # A number at the window's end may go on behind it ("1" of "1.5e-7").
                if not (self._near_end(end) and self._more()):
                    break
            except json.JSONDecodeError as error:
                if not (self._may_be_cut(error) and self._more()):
                    self._fail(error.msg, error.pos)
            except RecursionError:
                self._fail("brackets are nested too deeply", self._at)
            except ValueError as error:  # a number with thousands of digits
                self._fail(str(error), self._at)
            if len(self._text) - self._at > MAX_RECORD_BYTES + self._block:
                self._fail_too_long(len(spans) // 2)
        self._advance(end - self._at)
        spans.extend((start, self._byte))
        if self._byte - start > MAX_RECORD_BYTES:
            self._fail_too_long(len(spans) // 2 - 1)

    def _near_end(self, at: int) -> bool:
        return at > len(self._text) - _LONGEST_TOKEN

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        return self._near_end(error.pos) or error.msg.startswith("Unterminated string")

    def _next(self) -> str:
        """The next character that is no white space, or "" at the end of the file."""
        while True:
            match = _skip_space(self._text, self._at)
            self._advance((match.end() if match else self._at) - self._at)
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def _advance(self, count: int) -> None:
        end = self._at + count
        self._byte += count if self._text.isascii() else len(self._text[self._at : end].encode())
        self._at = end

    def _more(self) -> bool:
        """Drop what is done with and append at least as much as is left; at the end of the file change nothing."""
        if self._ended:
            return False
        left = len(self._text) - self._at
        data = self._file.read(max(self._block, left))
        pending = len(self._decode.getstate()[0])
        try:
            new = self._decode.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise InputError(
                f"is not UTF-8 text: {error.reason} at byte {self._read - pending + error.start}",
                where=self._name,
                remedy="Save it as UTF-8.",
            ) from error
        if not data:
            self._ended = True
            return False
        self._digest.update(data)
        self._read += len(data)
        self._line, self._column = self._place(self._at)
        self._text, self._at = self._text[self._at :] + new, 0
        return True

    def _place(self, at: int) -> tuple[int, int]:
        """Line and column of a character in the window."""
        lines = self._text.count("\n", 0, at)
        if not lines:
            return self._line, self._column + at
        return self._line + lines, at - self._text.rindex("\n", 0, at)

    def _fail(self, problem: str, at: int) -> NoReturn:
        line, column = self._place(at)
        raise InputError(
            f"is not valid JSON at line {line} column {column}: {problem}",
            where=self._name,
            remedy="Correct it there; a cut-off file must be written or downloaded again.",
        )

    def _fail_too_long(self, index: int) -> NoReturn:
        raise too_long(f"{self._name}: record {index}", None)

    def _refuse_other_top_level(self) -> NoReturn:
        kind = "an object" if self._text[self._at : self._at + 1] == "{" else "no list"
        try:
            value, _ = self._raw_decode(self._text, self._at)
            fields = f"an object with the fields {', '.join(list(value)[:8])}" if isinstance(value, dict) else ""
            kind = fields or repr(value)[:60]
        except json.JSONDecodeError as error:
            # An object that goes on behind the window is refused all the same; there is no need to read it.
            if not (self._may_be_cut(error) and self._more()):
                self._fail(error.msg, error.pos)
        except RecursionError:
            self._fail("brackets are nested too deeply", self._at)
        raise InputError(
            f"begins with {kind}; a .json file must be one list of records",
            where=self._name,
            remedy="Put the records into [ ... ]; if there is one record a line, name the file .jsonl.",
        )


def too_long(where: str, size: int | None) -> InputError:
    """The error for a record above `MAX_RECORD_BYTES`."""
    found = "more than that" if size is None else f"{size:,} bytes"
    return InputError(
        f"is longer than the {MAX_RECORD_BYTES:,} bytes a record may have ({found})",
        where=where,
        remedy="A quote or bracket may not be closed there; keep large images in files of their own.",
    )
