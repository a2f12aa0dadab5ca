"""From one raw record to a `Sample`, or to an `InputError` that names the record, the field and the remedy.

Three forms are read, told apart by their fields. A *conversation* is LLaVA's and ShareGPT's::

    {"id": "a7", "image": "cats/1.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

*Messages* are OpenAI's, with text or content parts (TRL, ms-swift, LLaMA-Factory, Unsloth)::

    {"id": "a7", "images": ["cats/1.jpg"],
     "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cat."}]}

A *question* is a row with ``question``, ``answer`` and ``image``, as most Hugging Face data sets have it. The same
rules hold for all (``turns.py``, ``image_places.py``): ``image`` or ``images`` is one image, a list of them, or absent;
each ``<image>`` in a question's text marks the place of one image, in order; if no place is marked anywhere, all images
go to the start of the first question, followed by a newline. ``<image>`` in an answer or a system prompt marks nothing:
it is text. Fields that are not read here are kept in `Sample.meta`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from symphony_vlm.data.fields import ImageReader, is_given, shortened, text_value
from symphony_vlm.data.image_places import place_images
from symphony_vlm.data.sample import Sample
from symphony_vlm.data.turns import IMAGE_MARKER, Turn, read_turns, split_at_markers
from symphony_vlm.errors import InputError

__all__ = ["FORMS", "RecordForm", "has_form", "sample_from_record"]

RecordForm = Literal["conversations", "messages", "question"]

FORMS = "either conversations, or messages, or question and answer"
"""What a record must have, for messages."""

_IMAGE_FIELDS = ("image", "images")
_READ = frozenset({"id", *_IMAGE_FIELDS})


def has_form(fields: Collection[str]) -> bool:
    """Whether records with these fields can be one of the three forms."""
    return "conversations" in fields or "messages" in fields or {"question", "answer"} <= set(fields)


def sample_from_record(record: object, *, where: str, index: int, image_folder: Path) -> Sample:
    """Check one raw record and bring it into the common form. No image is opened.

    Args:
        record: The parsed JSON value or table row.
        where: File and record for messages, e.g. ``train.json: record 12``; the id is added here.
        index: Its position in the file, the id of a record without one.
        image_folder: What relative image paths are relative to. Absolute paths and ``..`` are the user's own business.

    Raises:
        InputError: The record has none of the forms described at the top of this file.
    """
    if not isinstance(record, dict):
        raise InputError(
            f"is {shortened(record)}; a record must be an object with the fields id, image, and {FORMS}",
            where=where,
            kind="record_type",
        )
    sample_id = _sample_id(record.get("id"), where, index)
    origin = where if record.get("id") is None else f"{where} (id {sample_id!r})"
    form = _form(record, origin)
    reader = ImageReader(origin=origin, row=f"row {index}", folder=image_folder)
    own = reader.several(*_own_images(record, origin))
    read = _READ | ({"question", "answer"} if form == "question" else {form})
    meta = {key: value for key, value in record.items() if key not in read}
    if form == "question":
        turns = _question_turns(record, origin)
        if isinstance(record["answer"], list):
            meta["answers"] = record["answer"]
    else:
        turns = read_turns(record, form, reader)
        if turns[0].role == "system" and isinstance(record.get("system"), str):
            meta.pop("system", None)
    messages, images = place_images(turns, own, origin=origin, hint=_hint(meta))
    return Sample(id=sample_id, origin=origin, messages=messages, images=images, meta=meta)


def _sample_id(value: object, where: str, index: int) -> str:
    if value is None:
        return str(index)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise InputError(
            f"field 'id' is {shortened(value)}; it must be a string or an integer", where=where, kind="id_type"
        )
    return text_value(str(value), "id", where, required=False)


def _form(record: Mapping[str, Any], origin: str) -> RecordForm:
    turns: list[RecordForm] = [form for form in ("conversations", "messages") if record.get(form) is not None]
    if len(turns) > 1:
        raise InputError(
            "has both the fields 'conversations' and 'messages'", where=origin, remedy="Remove one of them."
        )
    if turns:
        return turns[0]
    if record.get("question") is not None or record.get("answer") is not None:
        return "question"
    if "conversations" not in record and "messages" not in record:
        raise InputError(
            f"field 'conversations' is missing; a record must have {FORMS}",
            where=origin,
            kind="conversations",
            remedy=f"Fields of this record: {', '.join(map(str, record)) or 'none'}.",
        )
    return "conversations" if "conversations" in record else "messages"


def _own_images(record: Mapping[str, Any], origin: str) -> tuple[object, str]:
    """The value and the name of the field with the record's images."""
    given = [field for field in _IMAGE_FIELDS if is_given(record.get(field)) and record[field] != []]
    if len(given) > 1:
        raise InputError("has both the fields 'image' and 'images'", where=origin, remedy="Remove one of them.")
    return (record[given[0]], given[0]) if given else (None, "image")


def _hint(meta: Mapping[str, Any]) -> str | None:
    for field, value in meta.items():
        if is_given(value) and str(field).lower().startswith(("image", "img", "picture", "video")):
            return f"The field '{field}' is not read; images are read from 'image' or 'images'."
    return None


def _question_turns(row: Mapping[str, Any], origin: str) -> list[Turn]:
    for field in ("question", "answer"):
        if field not in row:
            raise InputError(f"field '{field}' is missing", where=origin, kind="field_missing")
    question = text_value(row["question"], "question", origin, required=False)
    answer = _answer(row["answer"], origin)
    return [Turn("user", split_at_markers(question)), Turn("assistant", [answer], answer.count(IMAGE_MARKER))]


def _answer(value: object, origin: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        # Several annotators: the most frequent answer; among equals, the first given.
        given = Counter(item for item in value if item.strip())
        return text_value(given.most_common(1)[0][0] if given else "", "answer", origin, required=True)
    if not isinstance(value, str):
        raise InputError(
            f"field 'answer' is {shortened(value)}; it must be a string, a number or a list of strings",
            where=origin,
            kind="value_type",
        )
    return text_value(value, "answer", origin, required=True)
