"""From one raw record to a `Sample`, or to an `InputError` that names the record, the field and the remedy.

Two forms are read. A *conversation* is LLaVA's::

    {"id": "a7", "image": "cats/1.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

A *question* is a row with ``question``, ``answer`` and ``image``, as most Hugging Face data sets have it. The same
rules hold for both: ``image`` is one image, a list of them, or absent; each ``<image>`` in a question marks the place
of one image, in order; if no marker occurs anywhere, all images go to the start of the first question, followed by a
newline (LLaVA's layout). ``<image>`` in an answer or a system prompt marks nothing: it is text. Fields that are not
read here are kept in `Sample.meta`.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from symphony_vlm.data.images import image_from_base64
from symphony_vlm.data.sample import ImagePart, ImageRef, Message, Role, Sample, TextPart
from symphony_vlm.errors import InputError

__all__ = ["IMAGE_MARKER", "RecordForm", "sample_from_record", "shortened"]

IMAGE_MARKER = "<image>"

RecordForm = Literal["conversation", "question"]

_FIELDS: Mapping[RecordForm, frozenset[str]] = {
    "conversation": frozenset({"id", "image", "conversations"}),
    "question": frozenset({"id", "image", "question", "answer"}),
}

_ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

_Turns = list[tuple[Role, str]]


def sample_from_record(record: object, *, form: RecordForm, where: str, index: int, image_folder: Path) -> Sample:
    """Check one raw record and bring it into the common form. No image is opened.

    Args:
        record: The parsed JSON value or table row.
        form: Which of the two forms it has.
        where: File and record for messages, e.g. ``train.json: record 12``; the id is added here.
        index: Its position in the file, the id of a record without one.
        image_folder: What relative image paths are relative to. Absolute paths and ``..`` are the user's own business.

    Raises:
        InputError: The record does not have the form described at the top of this file.
    """
    if not isinstance(record, dict):
        raise InputError(
            f"is {shortened(record)}; a record must be an object with the fields {', '.join(sorted(_FIELDS[form]))}",
            where=where,
            kind="record_type",
        )
    sample_id = _sample_id(record.get("id"), where, index)
    origin = where if record.get("id") is None else f"{where} (id {sample_id!r})"
    images = tuple(_image_refs(record.get("image"), origin, index, image_folder))
    turns = _conversation_turns(record, origin) if form == "conversation" else _question_turns(record, origin)
    meta = {key: value for key, value in record.items() if key not in _FIELDS[form]}
    if form == "question" and isinstance(record["answer"], list):
        meta["answers"] = record["answer"]
    hint = "The field 'images' is not read; name it 'image'." if "images" in meta and not images else None
    messages = _place_images(turns, len(images), origin, hint)
    return Sample(id=sample_id, origin=origin, messages=messages, images=images, meta=meta)


def shortened(value: object, limit: int = 60) -> str:
    """The value as Python writes it, cut to fit into a message."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _sample_id(value: object, where: str, index: int) -> str:
    if value is None:
        return str(index)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise InputError(
            f"field 'id' is {shortened(value)}; it must be a string or an integer", where=where, kind="id_type"
        )
    return str(value)


def _image_refs(value: object, origin: str, index: int, folder: Path) -> Iterator[ImageRef]:
    if value is None:
        return
    several = isinstance(value, list)
    for number, item in enumerate(value if isinstance(value, list) else [value]):
        field = f"image[{number}]" if several else "image"
        name = f"row {index}, {field}" if several else f"row {index}"
        yield _image_ref(item, field=field, name=name, origin=origin, folder=folder)


def _image_ref(item: object, *, field: str, name: str, origin: str, folder: Path) -> ImageRef:
    """One image: a path, a data URL, encoded bytes, or the ``{bytes, path}`` of a Hugging Face image column."""
    if isinstance(item, dict) and (item.get("bytes") is not None or item.get("path") is not None):
        name = item.get("path") or name
        item = item["bytes"] if item.get("bytes") is not None else item["path"]
    if isinstance(item, bytes):
        return ImageRef(data=item, name=name)
    if not isinstance(item, str) or not item.strip():
        raise InputError(
            f"field '{field}' is {shortened(item)}; it must be a path, encoded bytes, or a list of these",
            where=origin,
            kind="image_field",
            remedy="Leave the field out for a record without an image.",
        )
    if item.startswith("data:"):
        try:
            return image_from_base64(item, name=f"{origin}, field '{field}'")
        except InputError as error:
            error.kind = "image_base64"
            raise
    if item.startswith(("http://", "https://")):
        raise InputError(
            f"field '{field}' is the web address {shortened(item)}; nothing is downloaded while training",
            where=origin,
            kind="web_address",
            remedy="Download the image and give its path.",
        )
    return ImageRef(path=folder / item, name=item)


def _conversation_turns(record: Mapping[str, Any], origin: str) -> _Turns:
    values = record.get("conversations")
    if not isinstance(values, list) or not values:
        found = f"is {shortened(values)}" if "conversations" in record else "is missing"
        raise InputError(
            f"field 'conversations' {found}; it must be a list of turns "
            '{"from": "human" or "gpt", "value": text}, the first from "human"',
            where=origin,
            kind="conversations" if values != [] else "conversations_empty",
            remedy=f"Fields of this record: {', '.join(map(str, record)) or 'none'}.",
        )
    turns = [_turn(value, f"conversations[{number}]", origin) for number, value in enumerate(values)]
    _check_order(turns, values, origin)
    return turns


def _turn(turn: object, field: str, origin: str) -> tuple[Role, str]:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise InputError(
            f'field \'{field}\' is {shortened(turn)}; it must be {{"from": "human" or "gpt", "value": text}}',
            where=origin,
            kind="turn_form",
            remedy="Rename 'role' to 'from' and 'content' to 'value'."
            if isinstance(turn, dict) and "role" in turn
            else None,
        )
    role = _ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise InputError(
            f"field '{field}.from' is {shortened(turn['from'])}; it must be one of {', '.join(_ROLES)}",
            where=origin,
            kind="unknown_role",
        )
    return role, _text(turn["value"], f"{field}.value", origin, required=role == "assistant")


def _text(value: object, field: str, origin: str, *, required: bool) -> str:
    if not isinstance(value, str):
        raise InputError(f"field '{field}' is {shortened(value)}; it must be a string", where=origin, kind="value_type")
    if required and not value.strip():
        raise InputError(
            f"field '{field}' is {shortened(value)}; an answer must not be empty",
            where=origin,
            kind="empty_answer",
            remedy="There would be nothing to learn from it: fill it in, or remove the turn with its question.",
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"field '{field}' has half a surrogate pair at character {error.start}, which is no text",
            where=origin,
            kind="surrogate",
            remedy="Write the file again from the source text as UTF-8.",
        ) from error
    return value


def _check_order(turns: _Turns, values: Sequence[Any], origin: str) -> None:
    """An optional system prompt, then question and answer in turn."""
    start = 1 if turns[0][0] == "system" else 0
    for number, (role, _) in enumerate(turns[start:], start=start):
        expected = ("user", "assistant")[(number - start) % 2]
        if role != expected:
            wanted = "human (or user)" if expected == "user" else "gpt (or assistant)"
            raise InputError(
                f"field 'conversations[{number}].from' is {values[number]['from']!r} where {wanted} is due",
                where=origin,
                kind="role_order",
                remedy="After an optional system turn, human and gpt must alternate, human first.",
            )
    if turns[-1][0] != "assistant":
        raise InputError(
            f"the last of {len(turns)} turns is from {values[-1]['from']!r}; a conversation must end with an answer",
            where=origin,
            kind="no_final_answer",
            remedy="Add the answer, or remove the last turn.",
        )


def _question_turns(row: Mapping[str, Any], origin: str) -> _Turns:
    for field in ("question", "answer"):
        if field not in row:
            raise InputError(f"field '{field}' is missing", where=origin, kind="field_missing")
    question = _text(row["question"], "question", origin, required=False)
    return [("user", question), ("assistant", _answer(row["answer"], origin))]


def _answer(value: object, origin: str) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        # Several annotators: the most frequent answer; among equals, the first given.
        given = Counter(item for item in value if item.strip())
        return _text(given.most_common(1)[0][0] if given else "", "answer", origin, required=True)
    if not isinstance(value, str):
        raise InputError(
            f"field 'answer' is {shortened(value)}; it must be a string, a number or a list of strings",
            where=origin,
            kind="value_type",
        )
    return _text(value, "answer", origin, required=True)


def _place_images(turns: _Turns, n_images: int, origin: str, hint: str | None) -> tuple[Message, ...]:
    in_questions = sum(text.count(IMAGE_MARKER) for role, text in turns if role == "user")
    elsewhere = sum(text.count(IMAGE_MARKER) for role, text in turns if role != "user")
    if n_images and not in_questions and not elsewhere:
        first = next(number for number, (role, _) in enumerate(turns) if role == "user")
        turns[first] = ("user", f"{IMAGE_MARKER * n_images}\n{turns[first][1]}")
    elif in_questions != n_images:
        also = f" (and {elsewhere} in answers or the system prompt, where it is only text)" if elsewhere else ""
        raise InputError(
            f"{in_questions} {IMAGE_MARKER} marker(s) in the questions{also} but {n_images} image(s) in the record",
            where=origin,
            kind="marker_count",
            remedy=hint or "Give one marker for each image, or no marker at all to have the images put first.",
        )
    numbers = itertools.count()
    return tuple(Message(role=role, parts=tuple(_parts(role, text, numbers))) for role, text in turns)


def _parts(role: Role, text: str, numbers: Iterator[int]) -> Iterator[TextPart | ImagePart]:
    pieces = text.split(IMAGE_MARKER) if role == "user" else [text]
    for position, piece in enumerate(pieces):
        if position:
            yield ImagePart(index=next(numbers))
        if piece:
            yield TextPart(text=piece)
