"""What can be wrong with a record: the kinds of faults, and one fault.

A *fault* is something that training cannot use or should not: it makes ``data check`` fail, and training can leave the
record out by it. What is merely worth knowing (the same picture under two names, a record that will be cut) is a note,
see ``report.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from symphony_vlm.errors import InputError

__all__ = ["KINDS", "OTHER", "Fault", "fault_of_record", "printable"]

OTHER = "malformed_record"

KINDS: Mapping[str, str] = {
    # The record.
    "invalid_json": "line is not valid JSON",
    "record_type": "record is not an object",
    "id_type": "id is neither text nor a whole number",
    "field_missing": "a field is missing",
    "conversations": "conversations missing or not a list",
    "conversations_empty": "conversation without turns",
    "turn_form": "turn without from or value",
    "unknown_role": "unknown role",
    "role_order": "roles do not alternate",
    "no_final_answer": "last turn is no answer",
    "empty_answer": "empty answer",
    "value_type": "text field is not text",
    "surrogate": "half a surrogate pair in the text",
    "marker_count": "image markers and images differ in number",
    "image_field": "image field is not a path or bytes",
    "image_base64": "image text is not a base64 image",
    "web_address": "image is a web address",
    OTHER: "malformed in another way",
    # The picture.
    "image_missing": "image file does not exist",
    "image_not_a_file": "image path is a folder or special file",
    "image_unreadable": "image file cannot be opened",
    "image_empty": "image file is empty",
    "image_html": "HTML page in place of an image",
    "image_lfs_pointer": "Git LFS pointer in place of an image",
    "image_unknown": "not a known image format",
    "image_damaged": "image truncated or damaged",
    "image_unsupported": "image of an unsupported type",
    "image_pixels": "image has too many pixels",
    "image_bytes": "image file is too large",
    "image_shape": "image of an absurd shape",
    # The record among the others.
    "duplicate_record": "the same record again",
    "duplicate_id": "id used by another record",
    # The record's tokens.
    "tokens": "cannot be tokenised faithfully",
    "image_cut": "max_length cuts into an image",
    "nothing_supervised": "no supervised token",
}
"""A short stable name for each kind, and what it means."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong with one record."""

    index: int
    """The record's position in its file, from 0; blank lines of a ``.jsonl`` do not count."""
    id: str
    """The record's id; its index if it has none or could not be read."""
    reason: str
    """File, record, field or image, what is wrong and what to do, in one line."""
    kind: str = OTHER
    """One of `KINDS`."""
    file: str = ""
    """Name of the data file."""

    def to_dict(self) -> dict[str, Any]:
        """For a line of ``faults.jsonl``."""
        values = asdict(self)
        return {key: values[key] for key in ("file", "index", "id", "kind", "reason")}


def fault_of_record(error: InputError, *, index: int, file: str) -> Fault:
    """The fault of a record that could not be read."""
    name = str(index) if error.record_id is None else error.record_id
    return Fault(index=index, id=printable(name), kind=error.kind or OTHER, reason=printable(str(error)), file=file)


def printable(text: str) -> str:
    """The text with half surrogate pairs written out, which no file and no terminal would take."""
    return text.encode("utf-8", "backslashreplace").decode()
