"""Where a prompt's text has its question: between a hint and what follows (options, OCR tokens, instruction)."""

from __future__ import annotations

import re

from symphony_vlm.evaluation.attacks.option_places import option_places
from symphony_vlm.evaluation.item import EvaluationItem

__all__ = ["question_span"]

_FOLLOWS = re.compile(
    r"\n+(?:Reference OCR token:|Choices:|(?:Please )?answer (?:the question|with|directly)\b"
    r"|When the provided information is insufficient|请直接)|\s*Please answer (?:directly|yes or no)\b"
    r"|\n*Options?:",
    re.IGNORECASE,
)
"""What the built-in tasks write behind a question, and the instructions that data sets bring with them."""


def question_span(item: EvaluationItem) -> tuple[int, int]:
    """Start and end of the question alone in ``item.question``.

    It starts with `EvaluationItem.asked` where the task says what that is, else at the beginning; it ends before the
    options, the OCR tokens and the instruction, whichever comes first.
    """
    text = item.question
    places = option_places(item)
    end = len(text) if places is None else places.start
    if item.asked:
        start = text.rfind(item.asked, 0, end)
        if start >= 0:
            return start, _end(text, start, start + len(item.asked))
    return 0, _end(text, 0, end)


def _end(text: str, start: int, end: int) -> int:
    match = _FOLLOWS.search(text, start, end)
    found = end if match is None else match.start()
    return start + len(text[start:found].rstrip())
