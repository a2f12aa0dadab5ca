"""Which option of a multiple choice an answer names."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from symphony_vlm.evaluation.item import EvaluationItem, Scored

__all__ = [
    "LETTER_INSTRUCTION",
    "lenient_letter",
    "letters",
    "options_block",
    "score_letter",
    "split_options",
    "strict_letter",
]

LETTER_INSTRUCTION = "\nAnswer with the option's letter from the given choices directly."
"""LLaVA's, after question and options."""

_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"answer is\s+(\**)([A-Za-z])\1(?![A-Za-z])", re.IGNORECASE)


def letters(n: int) -> str:
    """``ABC...`` for n options.

    Raises:
        ValueError: More than 26.
    """
    if not 0 <= n <= 26:
        raise ValueError(f"{n} options have no letters; need 0 to 26")
    return string.ascii_uppercase[:n]


def options_block(choices: Sequence[str]) -> str:
    """One line ``A. text`` per option."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(letters(len(choices)), choices, strict=True))


def strict_letter(text: str, n_options: int) -> str | None:
    """The letter if the stripped answer is one option's letter and nothing else."""
    text = text.strip()
    return text if len(text) == 1 and text in letters(n_options) else None


def lenient_letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter by VLMEvalKit's rule without its judge; None if the answer names no option.

    First (a) punctuation becomes white space: if exactly one option letter occurs as a token and its first occurrence
    is among the last four tokens, that one. Then (b), without case, ``answer is`` followed by an option's letter,
    optionally in asterisks. Then (c), if the answer is at most twice as long as all options together, the only option
    whose text occurs in it, without case.

    Args:
        text: The answer.
        choices: Texts of the options, A first.
    """
    names = letters(len(choices))
    tokens = text.translate(_PUNCTUATION).split()
    named = [letter for letter in names if letter in tokens]
    if len(named) == 1 and tokens.index(named[0]) >= len(tokens) - 4:
        return named[0]
    if (match := _ANSWER_IS.search(text)) is not None and match[2].upper() in names:
        return match[2].upper()
    lowered = text.lower()
    if len(text) <= 2 * sum(map(len, choices)):
        found = [letter for letter, choice in zip(names, choices, strict=True) if choice and choice.lower() in lowered]
        if len(found) == 1:
            return found[0]
    return None


def score_letter(prediction: str, item: EvaluationItem) -> Scored:
    """The strict rule, with the lenient one beside it.

    The status is ``unparsed`` where the strict rule finds no letter: what the lenient rule makes of the answer is in
    its own score.
    """
    if not prediction.strip():
        return Scored(score=0.0, parsed="", status="empty", lenient=0.0)
    lenient = lenient_letter(prediction, item.choices)
    forgiving = float(lenient == item.answers[0])
    strict = strict_letter(prediction, len(item.choices))
    if strict is None:
        return Scored(score=0.0, parsed="", status="unparsed", lenient=forgiving)
    # A bare letter is what the lenient rule takes first, so the two agree here.
    return Scored(score=float(strict == item.answers[0]), parsed=strict, lenient=forgiving)


def split_options(question: str) -> tuple[str, ...]:
    """The options inside a question, where they stand as ``A: text, B: text`` or on lines ``A. text``; else none."""
    for mark in ":.":
        places = _places(question, mark)
        if len(places) > 1:
            ends = [start for start, _ in places[1:]] + [len(question)]
            texts = [question[after:end].strip() for (_, after), end in zip(places, ends, strict=True)]
            # The comma between options belongs to none of them; a question's last option has nothing after it.
            return tuple(text.removesuffix(",").strip().partition("\n")[0] for text in texts)
    return ()


def _places(question: str, mark: str) -> list[tuple[int, int]]:
    """Start and end of ``A:``, ``B:`` ... in this order, each the first after the one before."""
    places: list[tuple[int, int]] = []
    position = 0
    for letter in string.ascii_uppercase:
        match = re.compile(rf"(?<!\S){letter}{re.escape(mark)}(?=\s|$)").search(question, position)
        if match is None:
            break
        places.append(match.span())
        position = match.end()
    return places
