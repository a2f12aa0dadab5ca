"""MathVista's rules: the answer in a response without a judge, and what is compared (lupantech/MathVista)."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["edit_distance", "normalize_extraction", "quick_extraction"]

_quoted_answer = re.compile(r'The answer is "(.*)"\.').search
_letter_in_parentheses = re.compile(r"\(([a-zA-Z])\)").search


def quick_extraction(response: str, choices: Sequence[str], question_type: str, answer_type: str) -> str | None:
    """The answer that a response holds, as far as rules can say.

    Args:
        response: What the model said.
        choices: Of a multiple choice.
        question_type: ``multi_choice`` or ``free_form``.
        answer_type: ``text``, ``integer``, ``float`` or ``list``.

    Returns:
        The empty string for an empty response; None where a judge would have to be asked.
    """
    if response == "" or (question_type == "multi_choice" and response in choices):
        return response
    try:
        if answer_type == "integer":
            return str(int(response))
        if answer_type == "float":
            return str(float(response))
    except ValueError:
        pass
    match = _quoted_answer(response)
    return match[1] if match else None


def normalize_extraction(
    extraction: object, choices: Sequence[str], question_type: str, answer_type: str, precision: float | None
) -> str | None:
    """What is compared with the answer.

    Of a multiple choice it is always one of the choices, even for an empty extraction: a letter in parentheses or a
    bare capital names it, else the nearest by edit distance, the first of several.

    Args:
        extraction: What a judge or `quick_extraction` found.
        choices: Of a multiple choice.
        question_type: ``multi_choice`` or ``free_form``.
        answer_type: ``text``, ``integer``, ``float`` or ``list``.
        precision: Decimals of a ``float``.

    Returns:
        None if it is no number where one is wanted.
    """
    if question_type == "multi_choice":
        return _choice(extraction.strip() if isinstance(extraction, str) else str(extraction), choices)
    try:
        if answer_type == "integer":
            return str(int(float(extraction)))  # type: ignore[arg-type]
        if answer_type == "float":
            decimals = None if precision is None else int(precision)
            return str(round(float(extraction), decimals))  # type: ignore[arg-type]
    except (ValueError, TypeError, OverflowError):
        return None
    return str(extraction)


def _choice(text: str, choices: Sequence[str]) -> str:
    if (letter := _letter_in_parentheses(text)) is not None:
        text = letter[1].upper()
    if len(text) == 1 and 0 <= ord(text) - ord("A") < len(choices):
        return choices[ord(text) - ord("A")]
    return min(choices, key=lambda choice: edit_distance(text, choice))


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's: insertions, deletions and replacements of one character."""
    previous = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        current = [i]
        for j, b in enumerate(second, start=1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (a != b)))
        previous = current
    return previous[-1]
