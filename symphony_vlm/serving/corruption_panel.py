"""The corruption tab: the last question about a picture, asked again of the clean and of a corrupted picture."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from symphony_vlm.corruptions import ALL, corrupt, corruption_rng, find_frost_textures, image_key
from symphony_vlm.errors import InputError
from symphony_vlm.serving.chat import ChatSession
from symphony_vlm.serving.faults import fault_text
from symphony_vlm.serving.page_settings import Sampling
from symphony_vlm.serving.uploads import open_upload
from symphony_vlm.serving.visitor import Exchange

if TYPE_CHECKING:
    from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["MAX_SIDE", "SEVERITIES", "Comparison", "answers_html", "ask_both", "corruption_choices", "picture_of"]

SEVERITIES = (1, 5)
MAX_SIDE = 1024
"""Larger pictures are made smaller first: corrupting millions of pixels takes minutes, and vision encoders see a few
hundred a side."""


def corruption_choices() -> list[str]:
    """The corruptions of ImageNet-C that this machine can draw, and the frost that needs no photographs."""
    try:
        find_frost_textures()
        without: tuple[str, ...] = ()
    except InputError:
        without = ("frost",)
    return [name for name in (*ALL, "frost_procedural") if name not in without]


def picture_of(exchange: Exchange) -> Image.Image:
    """The last picture of a question, no larger than what is corrupted."""
    picture = open_upload(exchange.uploads[-1])
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return picture


def _corrupted(picture: Image.Image, name: str, severity: float) -> Image.Image:
    if name not in corruption_choices():
        raise InputError(f"{name[:40]!r} is not one of {', '.join(corruption_choices())}", where="corruption")
    if severity not in range(SEVERITIES[0], SEVERITIES[1] + 1):
        raise InputError(f"{severity!r} is not one of 1, 2, 3, 4, 5", where="severity")
    pixels = np.asarray(picture)
    rng = corruption_rng(image_key(pixels), name, int(severity), seed=0)
    return Image.fromarray(corrupt(pixels, name, int(severity), rng))


@dataclass(kw_only=True)
class Comparison:
    """A question and the answers to it so far."""

    clean: Image.Image
    corrupted: Image.Image | None = None
    answers: dict[tuple[int, bool], str] = field(default_factory=dict)
    """By model and whether the picture is the corrupted one."""
    fault: str | None = None
    done: bool = False


def ask_both(
    models: Sequence[SymphonyVLMForConditionalGeneration],
    exchange: Exchange,
    name: str,
    severity: float,
    sampling: Sampling,
) -> Iterator[Comparison]:
    """Corrupts the picture and lets each model answer on both, each time as the first question of a conversation.

    Clean and corrupted are asked alike: one picture of one size, the same words, the same seed. Errors become the
    comparison's `fault`.
    """
    comparison = Comparison(clean=picture_of(exchange))
    yield comparison
    try:
        comparison.corrupted = _corrupted(comparison.clean, name, severity)
        yield comparison
        for number, model in enumerate(models):
            for is_corrupted, picture in ((False, comparison.clean), (True, comparison.corrupted)):
                session = ChatSession(model)
                session.add_image(picture)
                comparison.answers[number, is_corrupted] = ""
                pieces = session.stream(exchange.text, **sampling.arguments())
                try:
                    for piece in pieces:
                        comparison.answers[number, is_corrupted] += piece
                        yield comparison
                finally:
                    pieces.close()
    except Exception as error:
        comparison.fault = fault_text(error)
    comparison.done = True
    yield comparison


def answers_html(comparison: Comparison, titles: Sequence[str], *, corrupted: bool) -> str:
    """One column's answers, a card for each model."""
    cards = []
    for number, title in enumerate(titles):
        answer = comparison.answers.get((number, corrupted))
        other = comparison.answers.get((number, not corrupted))
        head = f"<b>{html.escape(title)}</b>" if len(titles) > 1 else ""
        if answer is None:
            text = '<span class="waiting">…</span>' if not comparison.done else '<span class="waiting">no answer</span>'
        else:
            text = html.escape(answer) or '<span class="waiting">an empty answer</span>'
        changed = comparison.done and corrupted and answer is not None and answer != other
        badge = '<span class="badge">differs</span>' if changed else ""
        cards.append(f'<div class="card">{head}<p>{text}</p>{badge}</div>')
    return "".join(cards)
