"""Writes a wrong answer onto the picture (typographic attack: Goh et al. 2021, distill.pub/2021/multimodal-neurons)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL import __version__ as pillow_version

from symphony_vlm.corruptions.randomness import corruption_rng
from symphony_vlm.evaluation.attacks.attack import Attack, Posed
from symphony_vlm.evaluation.attacks.word_swap import decimal_text
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.pictures import Picture
from symphony_vlm.evaluation.predictor import AnswersItems
from symphony_vlm.evaluation.rules.letters import letters

__all__ = ["Overlay", "Typographic", "draw_overlay"]

SMALLEST_FONT = 6
"""Pixels; below it nothing can be read."""
_LONGEST_TEXT = 80


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """A text and where it stands."""

    text: str
    font_size: int
    """In pixels."""
    left: int
    top: int


def draw_overlay(pixels: np.ndarray, overlay: Overlay, opacity: float) -> np.ndarray:
    """White text with a black edge over uint8 ``[H, W, 3]``; the input stays as it is."""
    image = Image.fromarray(pixels)
    layer = image.copy()
    draw = ImageDraw.Draw(layer)
    edge = _edge(overlay.font_size)
    place = (overlay.left + edge, overlay.top + edge)
    draw.text(place, overlay.text, "white", _font(overlay.font_size), "lt", stroke_width=edge, stroke_fill="black")
    return np.asarray(Image.blend(image, layer, opacity))


@dataclass(frozen=True, kw_only=True)
class Typographic(Attack):
    """A wrong answer is written over the first picture.

    The text is another of the question's options; of a yes/no question the opposite; else another answer of the same
    task, of questions of the same group where there are any.

    Attributes:
        size: height of the font as a share of the picture's shorter side; smaller where the text would not fit.
        opacity: 1 covers what is behind it.
    """

    name: ClassVar[str] = "typographic"
    own_pictures: ClassVar[bool] = True
    size: float = 0.15
    opacity: float = 1.0
    by_group: Mapping[str | None, tuple[str, ...]] = field(default_factory=dict)
    """Answers of the task by group, sorted, from `prepared`."""
    answers: tuple[str, ...] = ()
    """All of them."""

    @property
    def spec(self) -> str:
        """``typographic``, or ``typographic:SIZE[:OPACITY]`` where they are not the default."""
        if self.opacity != Typographic.opacity:
            return f"{self.name}:{decimal_text(self.size)}:{decimal_text(self.opacity)}"
        return self.name if self.size == Typographic.size else f"{self.name}:{decimal_text(self.size)}"

    @property
    def parameters(self) -> dict[str, Any]:
        """Size, opacity, colours and font."""
        family, style = _font(SMALLEST_FONT).getname()
        look = {"font": f"{family} {style} of Pillow {pillow_version}", "fill": "white", "edge": "black"}
        return {"size": self.size, "opacity": self.opacity, "position": "seeded"} | look

    def prepared(self, items: Sequence[EvaluationItem]) -> Attack:
        """With the answers that may be written on other questions' pictures."""
        groups: dict[str | None, set[str]] = {}
        for item in items:
            if item.answers and _can_be_written(_first(item)):
                groups.setdefault(item.group, set()).add(_first(item))
        every = tuple(sorted(set().union(*groups.values())))
        return replace(self, by_group={name: tuple(sorted(found)) for name, found in groups.items()}, answers=every)

    def applies_to(self, item: EvaluationItem) -> bool:
        """A picture, and a wrong answer that the font can write."""
        return bool(item.images) and self._wrong_answer(item, 0.0) is not None

    def shown(self, item: EvaluationItem, pictures: Sequence[Picture], seed: int) -> tuple[Picture, ...]:
        """The first picture with the text on it."""
        first = pictures[0]
        pixels = draw_overlay(first.pixels, self._overlay(item, first, seed), self.opacity)
        return (replace(first, pixels=pixels), *pictures[1:])

    def pose(
        self,
        item: EvaluationItem,
        pictures: Sequence[Picture],
        features: Sequence[Any] | None,
        predictor: AnswersItems,
        seed: int,
    ) -> list[Posed]:
        """The question as it is; the record says what stands where."""
        overlay = self._overlay(item, pictures[0], seed)
        height, width = pictures[0].pixels.shape[:2]
        facts = {
            "text": overlay.text,
            "font_size": overlay.font_size,
            "left": overlay.left,
            "top": overlay.top,
            "picture": [height, width],
            "opacity": self.opacity,
        }
        return [Posed(item=item, features=features, facts=facts)]

    def _overlay(self, item: EvaluationItem, picture: Picture, seed: int) -> Overlay:
        """Which text and where: a function of picture, question, size and seed."""
        key = hashlib.sha256(f"{picture.sha256}\n{item.id}".encode()).hexdigest()
        rng = corruption_rng(key, self.name, decimal_text(self.size), seed)
        text = self._wrong_answer(item, float(rng.random()))
        assert text is not None  # only items it applies to are attacked
        height, width = picture.pixels.shape[:2]
        font_size = max(SMALLEST_FONT, round(self.size * min(height, width)))
        while font_size > SMALLEST_FONT and _extent(text, font_size)[0] > width:
            font_size -= 1
        wide, high = _extent(text, font_size)
        top = int(rng.integers(0, max(1, height - high + 1)))
        return Overlay(text=text, font_size=font_size, top=top, left=int(rng.integers(0, max(1, width - wide + 1))))

    def _wrong_answer(self, item: EvaluationItem, draw: float) -> str | None:
        """One that can be written, by a draw in [0, 1); None if there is none."""
        right = {_plain(answer) for answer in (*item.answers, _first(item))}
        for pool in self._pools(item):
            start = int(draw * len(pool))
            # A right one may stand there. Filtering the pool of a large benchmark for each question would take hours.
            for step in range(len(pool)):
                text = pool[(start + step) % len(pool)]
                if _plain(text) not in right:
                    return text
        return None

    def _pools(self, item: EvaluationItem) -> Iterator[Sequence[str]]:
        """Where the wrong answer is taken from, the first that has one."""
        if item.choices:
            yield sorted({choice.strip() for choice in item.choices if _can_be_written(choice.strip())})
        elif _plain(_first(item)) in ("yes", "no"):
            yield ("no", "yes")
        else:
            yield self.by_group.get(item.group, ())
            yield self.answers


def _first(item: EvaluationItem) -> str:
    """The reference as text: of a letter the option's."""
    names = letters(min(len(item.choices), 26))
    answer = item.answers[0] if item.answers else ""
    return item.choices[names.index(answer)].strip() if answer in tuple(names) else answer


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()


def _can_be_written(text: str) -> bool:
    """Pillow's font has the Latin letters and little else."""
    try:
        text.encode("latin-1")
    except UnicodeEncodeError:
        return False
    return bool(text.strip()) and text.isprintable() and len(text) <= _LONGEST_TEXT


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # it is one with FreeType, which every wheel of Pillow has
    return font


def _edge(font_size: int) -> int:
    return max(1, font_size // 12)


def _extent(text: str, font_size: int) -> tuple[int, int]:
    """Width and height in pixels, the edge on both sides included."""
    left, top, right, bottom = _font(font_size).getbbox(text, anchor="lt")
    edge = _edge(font_size)
    return int(right - min(left, 0)) + 2 * edge, int(bottom - min(top, 0)) + 2 * edge
