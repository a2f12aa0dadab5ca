"""What yes-no answers say: the rules of POPE and MME, and a forgiving one."""

from __future__ import annotations

import re
from typing import Literal

__all__ = ["SHORT_INSTRUCTION", "first_yes_no", "mme_answer", "only_yes_or_no", "pope_answer"]

SHORT_INSTRUCTION = "\nAnswer the question using a single word or phrase."
"""LLaVA's, after the question."""

YesNo = Literal["yes", "no"]

_word = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def pope_answer(text: str) -> YesNo:
    """POPE's rule: no if ``No``, ``not`` or ``no`` is a word before the first full stop, else yes.

    Words are what stands between space characters once commas are deleted, so ``no`` with a line end is none of them,
    and neither is ``NO``.
    """
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def mme_answer(text: str) -> Literal["yes", "no", "other"]:
    """MME's rule: what the first four characters, in lower case and not stripped, contain."""
    head = text.lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def first_yes_no(text: str) -> YesNo | None:
    """The lenient rule: the first whole word that is yes or no, without case."""
    match = _word.search(text)
    if match is None:
        return None
    return "yes" if match[1].lower() == "yes" else "no"


def only_yes_or_no(text: str) -> YesNo | None:
    """The one of yes and no that occurs as a word, without case; None where neither or both do."""
    found = {match.lower() for match in _word.findall(text)}
    if len(found) != 1:
        return None
    return "yes" if "yes" in found else "no"
