"""The answer normaliser and the accuracy of the VQA family (TextVQA, VQAv2, VizWiz).

Two variants of the normaliser are in use: ``evalai`` (facebookresearch/mmf, used by LLaVA, TextVQA and VizWiz) and
``vqa`` (the official VQAv2 evaluation, GT-Vision-Lab/VQA). They differ in the first step alone. The accuracy is that of
Antol et al., VQA: Visual Question Answering (arXiv 1505.00468).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from symphony_vlm.data.fields import shortened
from symphony_vlm.evaluation.item import Scored
from symphony_vlm.evaluation.rows import Row

__all__ = ["CONTRACTIONS", "Variant", "normalize", "one_line", "soft_accuracy", "ten_answers", "vqa_score"]

Variant = Literal["evalai", "vqa"]

_ONE_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
""".split()  # noqa: SIM905
_SEVERAL_APOSTROPHES = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've you'd've y'all'll y'all'd've 'ow's'at
""".split()  # noqa: SIM905
# As published: some do nothing, and those with a capital are never reached, since the text is in lower case by then.
_ODD = {
    "somebody'd": "somebodyd",
    "let's": "let's",
    "she's": "she's",
    "Id've": "I'd've",
    "I'dve": "I'd've",
    "Im": "I'm",
    "Ive": "I've",
}


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _ONE_APOSTROPHE}
    for word in _SEVERAL_APOSTROPHES:
        for place, character in enumerate(word):
            if character == "'":
                table[word[:place] + word[place + 1 :]] = word
    return {**table, **_ODD}


CONTRACTIONS: Mapping[str, str] = MappingProxyType(_contractions())
"""Written without its apostrophe (or one of them) -> with it; 120 entries."""

_PUNCTUATION = r';/[]"{}()=+\_-><@`,?!'
_NUMBERS = {
    word: str(value)
    for value, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})

_comma_between_digits = re.compile(r"\d,\d").search
_period = re.compile(r"\.(?!\d)")
_MAX_PERIODS = int(re.UNICODE)
"""The published call passes ``re.UNICODE``, which is 32, where `re.sub` takes the number of replacements."""


def normalize(text: str, variant: Variant = "evalai") -> str:
    """The answer as it is compared.

    Args:
        text: A predicted or a human answer.
        variant: ``evalai`` or ``vqa``.
    """
    if variant == "evalai":
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = _without_punctuation(one_line(text))
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def one_line(text: str) -> str:
    """Newlines and tabs become spaces; stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """Punctuation is deleted where it stands beside a space, else a space takes its place.

    The conditions look at the text as it came: a mark deleted before does not change what becomes of the next.
    """
    comma_between_digits = _comma_between_digits(text) is not None
    result = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or comma_between_digits else " ")
    return _period.sub("", result, count=_MAX_PERIODS)


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the leave-one-out sets of human answers of ``min(1, matches / 3)``.

    An answer is left out by its position. Code that compares entries instead leaves out all equal ones where answers
    have no id (VizWiz), and scores lower.

    Args:
        prediction: Already normalised, as are ``answers``.
        answers: At least one; ten in every benchmark of the family, where 0, 1, 2, 3 and more matches give 0, 0.3,
            0.6, 0.9 and 1.
    """
    n, matches = len(answers), sum(answer == prediction for answer in answers)
    # Thirds are summed as integers, so that the result is the float nearest to the fraction.
    thirds = matches * min(3, matches - 1) + (n - matches) * min(3, matches)
    return thirds / (3 * n)


def vqa_score(prediction: str, normalized: str, answers: Sequence[str], *, lenient: float | None = None) -> Scored:
    """`soft_accuracy` with its status.

    Args:
        prediction: As the model wrote it.
        normalized: As it is compared.
        answers: As they are compared.
        lenient: By the forgiving rule, if there is one.
    """
    return Scored(
        score=soft_accuracy(normalized, answers),
        parsed=normalized,
        status="ok" if prediction.strip() else "empty",
        lenient=lenient,
    )


def ten_answers(row: Row) -> tuple[str, ...]:
    """The human answers of a record, as texts or as objects with ``answer``; none where they are not public.

    Raises:
        InputError: Not ten texts.
    """
    given = row.fields.get("answers")
    if given is None or given == []:
        return ()
    if not isinstance(given, list):
        raise row.error(f"field 'answers' is {shortened(given)}; it must be a list of ten people's answers")
    values = [answer.get("answer") if isinstance(answer, dict) else answer for answer in given]
    texts = tuple(value for value in values if isinstance(value, str))
    if len(values) != 10 or len(texts) != 10:
        raise row.error(
            f"field 'answers' holds {len(texts)} texts in {len(values)} entries; it must hold ten people's answers"
        )
    return texts
