"""Where a prompt's text has the options of a multiple choice."""

from __future__ import annotations

import re
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
        found: list[re.Match[str]] = []
        position = 0
        for letter, choice in zip(letters(len(choices)), choices, strict=True):
            mark = rf"(?<!\S){re.escape(before + letter + after)}\s*"
            match = re.compile(f"{mark}({re.escape(choice)})").search(item.question, position)
            if match is None:
                break
            found.append(match)
            position = match.end()
        if len(found) == len(choices):
            spans = tuple(match.span(1) for match in found)
            return OptionPlaces(text=item.question, start=found[0].start(), spans=spans)
    return None
