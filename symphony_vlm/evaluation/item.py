"""What is asked, and what a rule makes of an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from symphony_vlm.data.sample import ImagePart, ImageRef, Message, TextPart

__all__ = ["EvaluationItem", "Outcome", "ParseStatus", "Scored"]

ParseStatus = Literal["ok", "ambiguous", "unparsed", "empty", "error"]


@dataclass(frozen=True, kw_only=True)
class EvaluationItem:
    """One question about one set of images."""

    id: str
    question: str
    answers: tuple[str, ...]
    """Accepted answers; the first is the reference."""
    images: tuple[ImageRef, ...] = ()
    image_key: str = ""
    """What items about the same picture share; the unit of resampling unless `cluster` is given."""
    group: str | None = None
    """Question type or source, for the breakdown."""
    choices: tuple[str, ...] = ()
    """Options of a multiple choice, A first."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What the benchmark's metrics need besides: split, category, whether there is an image."""
    cluster: str = ""
    """The unit of resampling where questions about several pictures are scored together (HallusionBench's sets)."""
    asked: str = ""
    """The question alone, as it stands in `question`, where a hint that text attacks leave stands before it."""

    @property
    def messages(self) -> list[Message]:
        """The conversation that asks the question: images first, as in training."""
        parts = [ImagePart(index=i) for i in range(len(self.images))]
        text = TextPart(text=f"\n{self.question}" if parts else self.question)
        return [Message(role="user", parts=(*parts, text))]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A prediction's score."""

    score: float
    """0 to 1."""
    parsed: str
    """What the rule made of the prediction."""
    status: ParseStatus = "ok"
    lenient: float | None = None
    """0 to 1 by the benchmark's forgiving rule, where it has one."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """An item, what was answered, and what that is worth."""

    item: EvaluationItem
    prediction: str | None
    """None if the prediction is missing, which counts as wrong."""
    scored: Scored
