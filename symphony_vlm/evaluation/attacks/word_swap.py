"""Replaces words of a text by a meaningless one: the text attack of language modelling, and of questions.

A pure function without torch: perplexity (a line at a time, before tokenisation) and questions about pictures use the
same one. Words and counting are those of TextAttack's augmenter (QData/TextAttack, arXiv 2005.05909), as
stefvk/Elliptical-Attention uses it; the draws are ours, for that one sets no seed.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from symphony_vlm.corruptions.randomness import corruption_rng
from symphony_vlm.errors import InputError

__all__ = [
    "DEFAULT_RATE",
    "PROFILES",
    "STOP_WORDS_SHA256",
    "Profile",
    "SwappedText",
    "decimal_text",
    "stop_words",
    "word_swap",
]

Profile = Literal["textattack", "exact"]
PROFILES: tuple[Profile, ...] = get_args(Profile)

DEFAULT_RATE = 0.015
"""The only rate that public code of this attack shows (Elliptical Attention)."""
STOP_WORDS_SHA256 = "649e2341238138974f7fc014ba2c3655dc334605136791a9d1918a41fca86143"
"""Of ``stop_words.txt``: NLTK's 179 English ones, which TextAttack uses."""

_WORD = re.compile(r"[\w'*@-]+")  # \w has the underscore
_AT_BOTH_ENDS = "'-_*@"


@dataclass(frozen=True, kw_only=True)
class SwappedText:
    """An attacked text and how much of it was replaced."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Start and end of each replacement in `text`."""
    n_words: int
    n_eligible: int
    """Words that might have been replaced: no stop words, no token, no ``<unk>``."""

    @property
    def n_swapped(self) -> int:
        """Replaced words."""
        return len(self.spans)

    @property
    def realised_rate(self) -> float:
        """Replaced words over all words; 0 of a text without words. On short lines it is above the rate asked for."""
        return self.n_swapped / self.n_words if self.n_words else 0.0


@cache
def stop_words() -> frozenset[str]:
    """The words that stay, in lower case.

    Raises:
        InputError: the file is not the one of this version.
    """
    path = Path(__file__).with_name("stop_words.txt")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != STOP_WORDS_SHA256:
        raise InputError("is not the list of this version", where=str(path), remedy="Install the package again.")
    return frozenset(content.decode("ascii").split())


def word_swap(
    text: str,
    rate: float = DEFAULT_RATE,
    *,
    token: str = "AAA",
    profile: Profile = "textattack",
    seed: int = 0,
    line_index: int = 0,
) -> SwappedText:
    """Replaces words by ``token``; all other characters stay as they are.

    Equal arguments give equal texts: the draws of a line depend on its text, its index, the rate and the seed alone.

    Args:
        text: a line, or several, each attacked by itself; the second has the index ``line_index + 1``.
        rate: above 0, at most 1.
        token: what replaces a word.
        profile: ``textattack``: of each line max(int(rate x words), 1) eligible words, drawn without replacement;
            ``exact``: each eligible word by itself with probability ``rate``.
        seed: of the draws.
        line_index: which line of its file the text is, so that equal lines are attacked in different places.

    Returns:
        Text, places of the replacements, and counts.

    Raises:
        InputError: a rate outside (0, 1], or no such profile.
    """
    if not 0 < rate <= 1:
        raise InputError(f"the rate is {rate}; it must be above 0 and at most 1", where="word_swap")
    if profile not in PROFILES:
        raise InputError(f"{profile!r} is none of {', '.join(PROFILES)}", where="word_swap profile")
    lines: list[str] = []
    spans: list[tuple[int, int]] = []
    n_words = n_eligible = position = 0
    for number, line in enumerate(text.split("\n")):
        words = _words(line)
        eligible = [span for span in words if _is_eligible(line, span, token)]
        chosen = _chosen(line, line_index + number, rate, profile, seed, len(words), len(eligible))
        swapped, places = _replaced(line, [eligible[index] for index in chosen], token)
        spans += [(position + start, position + end) for start, end in places]
        position += len(swapped) + 1
        lines.append(swapped)
        n_words, n_eligible = n_words + len(words), n_eligible + len(eligible)
    return SwappedText(text="\n".join(lines), spans=tuple(spans), n_words=n_words, n_eligible=n_eligible)


def decimal_text(number: float) -> str:
    """The shortest decimal text of a number, without an exponent: how a rate enters the key of the draws."""
    return format(Decimal(repr(float(number))), "f")


def _words(line: str) -> list[tuple[int, int]]:
    spans = []
    for match in _WORD.finditer(line):
        bare = match[0].lstrip(_AT_BOTH_ENDS)
        start = match.end() - len(bare)
        end = start + len(bare.rstrip(_AT_BOTH_ENDS))
        if end > start:
            spans.append((start, end))
    return spans


def _is_eligible(line: str, span: tuple[int, int], token: str) -> bool:
    start, end = span
    word = line[start:end]
    is_unknown = line[max(0, start - 1) : end + 1] == "<unk>"
    return word != token and not is_unknown and word not in stop_words()


def _chosen(
    line: str, line_index: int, rate: float, profile: Profile, seed: int, n_words: int, n_eligible: int
) -> list[int]:
    """Indices into the eligible words, in order."""
    key = hashlib.sha256(f"{line}\n{line_index}".encode()).hexdigest()
    rng = corruption_rng(key, "word_swap", decimal_text(rate), seed)
    if profile == "exact":
        return [index for index, draw in enumerate(rng.random(n_eligible)) if draw < rate]
    count = max(int(rate * n_words), 1)
    return sorted(int(index) for index in rng.permutation(n_eligible)[:count])


def _replaced(line: str, chosen: list[tuple[int, int]], token: str) -> tuple[str, list[tuple[int, int]]]:
    parts: list[str] = []
    places: list[tuple[int, int]] = []
    last = length = 0
    for start, end in chosen:
        kept = line[last:start]
        places.append((length + len(kept), length + len(kept) + len(token)))
        parts += [kept, token]
        length += len(kept) + len(token)
        last = end
    return "".join([*parts, line[last:]]), places
