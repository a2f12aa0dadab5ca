"""The turns of one record, in either way of writing them, checked; and the places of its images in them.

A turn is LLaVA's and ShareGPT's ``{"from": "human", "value": text}`` or OpenAI's ``{"role": "user", "content": text or
parts}``. In *text* of a user's turn ``<image>`` marks the place of one of the record's images. In *parts* a place is a
part of its own, and ``<image>`` inside a text part is text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from symphony_vlm.data.fields import ImageReader, is_given, shortened, text_value
from symphony_vlm.data.sample import ImageRef, Role
from symphony_vlm.errors import InputError

__all__ = ["IMAGE_MARKER", "Piece", "Place", "Turn", "read_turns", "split_at_markers"]

IMAGE_MARKER = "<image>"


@dataclass(frozen=True)
class Place:
    """The place of one of the record's own images."""

    index: int | None = None
    """Which one (the ``index`` of a content part), or the next."""


Piece = str | ImageRef | Place


@dataclass
class Turn:
    """One turn, not yet a `Message`: its images have no numbers."""

    role: Role
    pieces: list[Piece]
    markers_as_text: int = 0
    """How many ``<image>`` stand in text where they mark nothing: an answer or a system prompt."""


_ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}
_TOOL_ROLES = frozenset({"tool", "function", "function_call", "function_response", "observation", "ipython"})
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
_IMAGE_PARTS = frozenset({"image", "image_url", "input_image"})
_IMAGE_KEYS = ("image", "image_url", "url", "path", "base64")

_TURN_FORM = '{"from": "human" or "gpt", "value": text} or {"role": "user" or "assistant", "content": text or parts}'
_PART_FORM = (
    '{"type": "text", "text": text}, {"type": "image", "image": path} or '
    '{"type": "image_url", "image_url": {"url": path}}'
)


def read_turns(record: Mapping[str, Any], field: str, images: ImageReader) -> list[Turn]:
    """The checked turns of a record: an optional system prompt, then question and answer in turn, ending in an answer.

    Args:
        record: The record; its ``system``, if it has one, is the system prompt (LLaMA-Factory's ShareGPT form).
        field: ``conversations`` or ``messages``.
        images: Reads the images inside content parts.

    Raises:
        InputError: Not of that form; names record and field.
    """
    origin, values = images.origin, record.get(field)
    if not isinstance(values, list) or not values:
        raise InputError(
            f"field '{field}' is {shortened(values)}; it must be a list of turns {_TURN_FORM}, the first a question",
            where=origin,
            kind="conversations" if values != [] else "conversations_empty",
        )
    turns = [_turn(value, f"{field}[{number}]", images) for number, value in enumerate(values)]
    _check_order(turns, values, field, origin)
    system = record.get("system")
    if isinstance(system, str) and system.strip():
        if turns[0].role == "system":
            raise InputError(
                f"has both the field 'system' and a system turn in '{field}'",
                where=origin,
                remedy="Remove one of them.",
            )
        turns.insert(0, _text_turn("system", text_value(system, "system", origin, required=False)))
    return turns


def split_at_markers(text: str) -> list[Piece]:
    """A question's text with a `Place` for each marker."""
    first, *others = text.split(IMAGE_MARKER)
    pieces: list[Piece] = [first]
    for other in others:
        pieces += [Place(), other]
    return pieces


def _text_turn(role: Role, text: str) -> Turn:
    if role == "user":
        return Turn(role, split_at_markers(text))
    return Turn(role, [text], markers_as_text=text.count(IMAGE_MARKER))


def _turn(turn: object, field: str, images: ImageReader) -> Turn:
    origin = images.origin
    if not isinstance(turn, dict) or not (is_given(turn.get("from")) or is_given(turn.get("role"))):
        raise InputError(
            f"field '{field}' is {shortened(turn)}; it must be {_TURN_FORM}", where=origin, kind="turn_form"
        )
    who, what = ("role", "content") if is_given(turn.get("role")) else ("from", "value")
    name = turn[who]
    if (isinstance(name, str) and name in _TOOL_ROLES) or turn.get("tool_calls") or turn.get("function_call"):
        raise InputError(
            f"field '{field}' is part of a tool call ({who} {name!r}); tools cannot be trained",
            where=origin,
            remedy="Leave the record out, or write call and result as text of questions and answers.",
        )
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise InputError(
            f"field '{field}.{who}' is {shortened(name)}; it must be one of {', '.join(_ROLES)}",
            where=origin,
            kind="unknown_role",
        )
    # What ms-swift and OpenAI leave out of the loss would be trained here in silence.
    if role == "assistant" and any(turn.get(key) == 0 for key in ("loss", "weight")):
        raise InputError(
            f"field '{field}' has a loss weight of zero; every answer is trained here",
            where=origin,
            remedy="Leave the record out, or end it before this answer.",
        )
    if what not in turn:
        raise InputError(
            f"field '{field}.{what}' is missing; a turn must be {_TURN_FORM}",
            where=origin,
            kind="turn_form",
            remedy=f"Fields of this turn: {', '.join(map(str, turn))}.",
        )
    value = turn[what]
    if what == "content" and isinstance(value, list):
        return _parts_turn(role, value, f"{field}.content", images)
    return _text_turn(role, text_value(value, f"{field}.{what}", origin, required=role == "assistant"))


def _parts_turn(role: Role, values: Sequence[Any], field: str, images: ImageReader) -> Turn:
    pieces = [_part(value, f"{field}[{number}]", images) for number, value in enumerate(values)]
    if role != "user":
        for number, piece in enumerate(pieces):
            if not isinstance(piece, str):
                raise InputError(
                    f"field '{field}[{number}]' is an image in a turn of the {role}; images can only stand in "
                    "questions",
                    where=images.origin,
                )
        text = "".join(piece for piece in pieces if isinstance(piece, str))
        pieces = [text_value(text, field, images.origin, required=role == "assistant")]
    elif not pieces:
        raise InputError(f"field '{field}' is []; it must hold at least one part {_PART_FORM}", where=images.origin)
    return Turn(role, pieces)


def _part(part: object, field: str, images: ImageReader) -> Piece:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str) or kind not in _TEXT_PARTS | _IMAGE_PARTS:
        found = f"has the type {shortened(kind)}" if isinstance(kind, str) else f"is {shortened(part)}"
        raise InputError(f"field '{field}' {found}; it must be {_PART_FORM}", where=images.origin)
    if kind in _TEXT_PARTS:
        return text_value(part.get("text"), f"{field}.text", images.origin, required=False)
    given = [key for key in _IMAGE_KEYS if is_given(part.get(key))]
    if len(given) > 1:
        raise InputError(
            f"field '{field}' has {' and '.join(map(repr, given))}; one of them must give the image",
            where=images.origin,
        )
    if not given:
        if kind != "image":
            raise InputError(
                f"field '{field}' has no image; it must be {_PART_FORM}",
                where=images.origin,
                remedy='A place for one of the record\'s own images is {"type": "image"}.',
            )
        return _place(part.get("index"), field, images.origin)
    key = given[0]
    value, name = part[key], f"{field}.{key}"
    if key == "image_url" and isinstance(value, dict):
        value, name = value.get("url"), f"{name}.url"
    return images.from_base64(value, name) if key == "base64" else images(value, name)


def _place(index: object, field: str, origin: str) -> Place:
    if index is not None and (isinstance(index, bool) or not isinstance(index, int) or index < 0):
        raise InputError(
            f"field '{field}.index' is {shortened(index)}; it must be the number of one of the record's images, from 0",
            where=origin,
        )
    return Place(index)


def _check_order(turns: Sequence[Turn], values: Sequence[Any], field: str, origin: str) -> None:
    start = 1 if turns[0].role == "system" else 0
    for number, turn in enumerate(turns[start:], start=start):
        expected = ("user", "assistant")[(number - start) % 2]
        if turn.role != expected:
            who = "role" if is_given(values[number].get("role")) else "from"
            wanted = "human (or user)" if expected == "user" else "gpt (or assistant)"
            raise InputError(
                f"field '{field}[{number}].{who}' is {values[number][who]!r} where {wanted} is due",
                where=origin,
                kind="role_order",
                remedy="After an optional system turn, questions and answers must alternate, a question first.",
            )
    if turns[-1].role != "assistant":
        last = values[-1].get("role") or values[-1].get("from")
        raise InputError(
            f"the last of {len(turns)} turns is from {last!r}; a conversation must end with an answer",
            where=origin,
            kind="no_final_answer",
            remedy="Add the answer, or remove the last turn.",
        )
