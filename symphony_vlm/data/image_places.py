"""Which image stands where: the record's own images and those inside content parts, numbered as they appear."""

from __future__ import annotations

from collections.abc import Sequence

from symphony_vlm.data.sample import ImagePart, ImageRef, Message, TextPart
from symphony_vlm.data.turns import IMAGE_MARKER, Piece, Place, Turn
from symphony_vlm.errors import InputError

__all__ = ["place_images"]


def place_images(
    turns: Sequence[Turn], own: Sequence[ImageRef], *, origin: str, hint: str | None = None
) -> tuple[tuple[Message, ...], tuple[ImageRef, ...]]:
    """Fill the places of a record's turns.

    Each place takes one of the record's own images, in order unless it names one. A record whose turns have neither a
    place nor an image of their own has its images put at the start of the first question, followed by a newline
    (LLaVA's layout).

    Args:
        turns: From `read_turns`.
        own: The record's own images.
        origin: File and record, for messages.
        hint: What may be the reason for a wrong number of images.

    Returns:
        The messages, and the images in the order in which they stand in them.

    Raises:
        InputError: Not as many places as images, or a place names an image that is not there or is named twice.
    """
    places = [piece for turn in turns for piece in turn.pieces if isinstance(piece, Place)]
    inline = any(isinstance(piece, ImageRef) for turn in turns for piece in turn.pieces)
    as_text = sum(turn.markers_as_text for turn in turns)
    if own and not places and not inline and not as_text:
        places = [Place()] * len(own)
        first = next(turn for turn in turns if turn.role == "user")
        first.pieces = [*places, "\n", *first.pieces]
    elif len(places) != len(own):
        also = f" (and {as_text} in answers or the system prompt, where it is only text)" if as_text else ""
        raise InputError(
            f"{len(places)} {IMAGE_MARKER} marker(s) in the questions{also} but {len(own)} image(s) in the record",
            where=origin,
            kind="marker_count",
            remedy=hint
            or "Give one marker for each image, or no marker at all to have the images put first; to write about "
            f'{IMAGE_MARKER} itself, use messages with {{"type": "text"}} parts.',
        )
    order = iter(_order(places, len(own), origin))
    images: list[ImageRef] = []
    messages = []
    for turn in turns:
        parts: list[TextPart | ImagePart] = []
        for piece in _joined(turn.pieces):
            if isinstance(piece, str):
                parts.append(TextPart(text=piece))
            else:
                parts.append(ImagePart(index=len(images)))
                images.append(own[next(order)] if isinstance(piece, Place) else piece)
        messages.append(Message(role=turn.role, parts=tuple(parts)))
    return tuple(messages), tuple(images)


def _order(places: Sequence[Place], n_images: int, origin: str) -> list[int]:
    """The number of the image that each place takes."""
    named: set[int] = set()
    for index in (place.index for place in places if place.index is not None):
        if index >= n_images or index in named:
            problem = "more than one part" if index < n_images else f"a part, but the record has {n_images} image(s)"
            raise InputError(f"image {index} is named by {problem}; numbers count from 0", where=origin)
        named.add(index)
    rest = (index for index in range(n_images) if index not in named)
    return [next(rest) if place.index is None else place.index for place in places]


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Without empty texts, and neighbouring texts as one: how they were cut up must not decide their tokens."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, str) and isinstance(last, str):
            joined[-1] = last + piece
        elif piece != "":
            joined.append(piece)
    return joined
