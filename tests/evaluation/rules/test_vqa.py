"""The VQA normaliser and accuracy: every vector of the rule, and a brute-force oracle."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from symphony_vlm.evaluation.rules.vqa import CONTRACTIONS, Variant, normalize, soft_accuracy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,000", "1000"),
        ("St. Louis", "st louis"),
        ("3.5", "3.5"),
        ("it's", "it 's"),
        ("Dont", "don't"),
        ("None", "0"),
        ("The A", ""),
        ("U.S.A.", "usa"),
        ("10:30", "10:30"),
        ("$5.00", "$5.00"),
        ("coca-cola", "coca cola"),
        ("Two dogs", "2 dogs"),
        ("1/2", "1 2"),
        ("t-shirt , red", "t shirt red"),
        ("1,000 - 2,000", "1000 2000"),
        ("." * 40, "." * 8),
        ("a\nb\tc", "b c"),
        ("What, me?", "what me"),
        ("couldntve", "couldntve"),
        ("Im", "im"),
    ],
)
def test_vectors_of_the_evalai_variant(text: str, expected: str) -> None:
    assert normalize(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("it's", "it's"),
        ("Dont", "don't"),
        ("1,000", "1000"),
        ("None", "0"),
        ("red, blue", "red blue"),
        ("red,blue", "red blue"),
        ("1,000 t-shirts", "1000 tshirts"),
        ("Yes", "yes"),
        ("." * 40, "." * 8),
    ],
)
def test_vectors_of_the_vqa_variant(text: str, expected: str) -> None:
    """A comma between two digits deletes every mark, the hyphen of another word included."""
    assert normalize(text, "vqa") == expected


def test_the_normaliser_is_not_idempotent_because_32_is_a_count_and_not_a_flag() -> None:
    once = normalize("." * 70)
    assert once == "." * 38
    assert normalize(once) == "." * 6


def test_conditions_look_at_the_text_as_it_came() -> None:
    # ';' goes first and leaves a space before '/', which was not there: '/' must still become a space.
    assert normalize("x ;/y") == "x y"
    assert normalize("a;/ b/c") == "bc", "'/' stands before a space once, so every '/' is deleted"


def test_the_table_of_contractions_has_120_entries() -> None:
    assert len(CONTRACTIONS) == 120
    samples = {
        "aint": "ain't",
        "twas": "'twas",
        "maam": "ma'am",
        "oclock": "o'clock",
        "couldnt've": "couldn't've",
        "couldn'tve": "couldn't've",
        "y'allll": "y'all'll",
        "yall'll": "y'all'll",
        "yall'd've": "y'all'd've",
        "y'alld've": "y'all'd've",
        "y'all'dve": "y'all'd've",
        "ow's'at": "'ow's'at",
        "'ows'at": "'ow's'at",
        "'ow'sat": "'ow's'at",
        "somebody'd": "somebodyd",
        "let's": "let's",
        "she's": "she's",
        "Id've": "I'd've",
        "I'dve": "I'd've",
        "Im": "I'm",
        "Ive": "I've",
        "youve": "you've",
    }
    assert {key: CONTRACTIONS.get(key) for key in samples} == samples
    assert "im" not in CONTRACTIONS
    assert "were" not in CONTRACTIONS, "a word of its own"


def _brute_force(prediction: str, answers: list[str]) -> float:
    total = Fraction(0)
    for left_out in range(len(answers)):
        others = answers[:left_out] + answers[left_out + 1 :]
        total += min(Fraction(1), Fraction(others.count(prediction), 3))
    return float(total / len(answers))


@pytest.mark.parametrize("matches", range(11))
def test_accuracy_of_ten_answers(matches: int) -> None:
    answers = ["x"] * matches + [f"other {i}" for i in range(10 - matches)]
    expected = {0: 0.0, 1: 0.3, 2: 0.6, 3: 0.9}.get(matches, 1.0)
    assert soft_accuracy("x", answers) == expected == _brute_force("x", answers)


def test_accuracy_is_the_brute_force_over_positions_whatever_the_answers() -> None:
    rng = random.Random(0)
    for _ in range(300):
        answers = [rng.choice("abc") for _ in range(rng.randint(1, 12))]
        assert soft_accuracy("a", answers) == _brute_force("a", answers)


@pytest.mark.parametrize("variant", ["evalai", "vqa"])
def test_the_normaliser_takes_any_text(variant: Variant) -> None:
    rng = random.Random(1)
    alphabet = "aA1,.;?'!-/ \n\t\u00e9\u0661\u2028"
    for _ in range(500):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 20)))
        result = normalize(text, variant)
        assert result == " ".join(result.split())
        assert not set(result) & set(",;?!-/")
