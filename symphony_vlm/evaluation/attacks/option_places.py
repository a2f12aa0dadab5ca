"""Where a prompt's text has the options of a multiple choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.rules.letters import letters

__all__ = ["OptionPlaces", "option_places"]

_MARKS = (("", "."), ("(", ")"), ("", ":"))
"""What stands around an option's letter: ``A.``, ``(A)``, ``A:``."""


@dataclass(frozen=True, kw_only=True)
class OptionPlaces:
    """The options inside a question."""

    text: str
    """The question."""
    start: int
    """Where the mark of the first option stands."""
    spans: tuple[tuple[int, int], ...]
    """Start and end of each option's text, without its mark."""

    def with_texts(self, texts: Sequence[str]) -> str:
        """The question with other texts at the same letters."""
        parts: list[str] = []
        last = 0
        for (start, end), text in zip(self.spans, texts, strict=True):
            parts += [self.text[last:start], text]
            last = end
        return "".join([*parts, self.text[last:]])


def option_places(item: EvaluationItem) -> OptionPlaces | None:
    """The places of all of ``item.choices``, in order; None where one of them is empty or cannot be found."""
    choices = [choice.strip() for choice in item.choices]
    if not choices or not all(choices) or len(choices) > 26:
        return None
    for before, after in _MARKS:
        marks: list[int] = []
        spans: list[tuple[int, int]] = []
        for letter, choice in zip(letters(len(choices)), choices, strict=True):
            place = _find(item.question, before + letter + after, choice, spans[-1][1] if spans else 0)
            if place is None:
                break
            marks.append(place[0])
            spans.append((place[1], place[1] + len(choice)))
        if len(spans) == len(choices):
            return OptionPlaces(text=item.question, start=marks[0], spans=tuple(spans))
    return None


def _find(text: str, mark: str, choice: str, position: int) -> tuple[int, int] | None:
    """Where the mark stands at the beginning of a word with the choice behind it, and where that begins."""
    while (start := text.find(mark, position)) >= 0:
        after = start + len(mark)
        while after < len(text) and text[after].isspace():
            after += 1
        if (start == 0 or text[start - 1].isspace()) and text.startswith(choice, after):
            return start, after
        position = start + 1
    return None
