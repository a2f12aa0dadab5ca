"""MMMU's rules for free answers: which strings and numbers an answer holds."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["extract_numbers", "normalize_answer", "open_answers", "open_is_right"]

_PATTERNS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
"""Numbers with commas, in scientific notation, and plain ones."""

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def extract_numbers(text: str) -> list[str]:
    """Numbers in a text, as they stand: those with commas, then scientific, then plain."""
    return [match for pattern in _PATTERNS for match in pattern.findall(text)]


def normalize_answer(text: str) -> list[str | float]:
    """A number (commas removed) as a float rounded to 2; a single character c as `` c`` and ``c ``; else lower case.

    A single character gets its space so that it does not match inside a word.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lowered = text.lower()
        return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]


def open_answers(response: str) -> list[str | float]:
    """The strings and numbers that an answer to an open question may mean, each normalised."""
    response = response.strip().strip(".").lower()
    parts = response.split("\n")
    tails: list[str] = []
    for number, part in enumerate(parts):
        indicators = (*_INDICATORS, "=") if number == len(parts) - 1 else _INDICATORS
        tail = _shortest_tail(part, indicators)
        # A tail of one punctuation mark says nothing.
        if tail and tail not in {":", ",", ".", "!", "?", ";", "'"}:
            tails.append(tail)
    candidates = tails or [response]
    numbers = [number for candidate in candidates for number in extract_numbers(candidate)]
    return [value for text in [*candidates, *numbers] for value in normalize_answer(text)]


def _shortest_tail(part: str, indicators: Sequence[str]) -> str:
    """The shortest text after the last of an indicator; an empty one never wins over a later one."""
    shortest = ""
    for indicator in indicators:
        if indicator in part:
            tail = part.split(indicator)[-1].strip()
            if not shortest or len(tail) < len(shortest):
                shortest = tail
    return shortest


def open_is_right(predicted: Sequence[str | float], gold: Sequence[str]) -> bool:
    """Whether a gold string is contained in a predicted string, or a number is equal."""
    wanted = [value for answer in gold for value in normalize_answer(answer)]
    for value in predicted:
        if isinstance(value, str):
            if any(isinstance(answer, str) and answer in value for answer in wanted):
                return True
        elif value in wanted:
            return True
    return False
