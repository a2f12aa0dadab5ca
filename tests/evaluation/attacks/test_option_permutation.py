"""Options in every order: letters, gold, and what is counted; against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from symphony_vlm.evaluation.attacks.letter_bias import letter_bias
from symphony_vlm.evaluation.attacks.option_permutation import (
    OptionPermutation,
    option_orders,
    permuted,
    refers_to_others,
)
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.rules.letters import LETTER_INSTRUCTION, letters, options_block, score_letter


def choice_item(choices: tuple[str, ...], answer: str = "A", question: str | None = None) -> EvaluationItem:
    text = question or f"What is it?\n{options_block(choices)}{LETTER_INSTRUCTION}"
    return EvaluationItem(id="q", question=text, answers=(answer,), choices=choices, image_key="k")


@pytest.mark.parametrize("k", [2, 3, 4])
def test_up_to_four_options_every_order_occurs_once_the_original_first(k: int) -> None:
    orders = option_orders(k, seed=3)
    assert orders[0] == tuple(range(k))
    assert set(orders) == set(itertools.permutations(range(k)))
    assert len(orders) == math.factorial(k)
    assert orders == option_orders(k, seed=4)


@pytest.mark.parametrize("k", [5, 7])
def test_of_more_options_a_seeded_sample_has_all_rotations(k: int) -> None:
    orders = option_orders(k, seed=3)
    assert len(set(orders)) == len(orders) == 24
    assert {tuple((s + i) % k for i in range(k)) for s in range(k)} <= set(orders)
    assert orders == option_orders(k, seed=3) != option_orders(k, seed=4)
    assert orders[:k] == option_orders(k, seed=4)[:k]


def test_all_orders_of_five() -> None:
    assert set(option_orders(5, every=True)) == set(itertools.permutations(range(5)))


def test_letters_stay_texts_move_and_the_gold_letter_follows() -> None:
    item = choice_item(("red", "green", "a red car"), "C")
    for order in option_orders(3):
        moved = permuted(item, order)
        assert moved.choices == tuple(item.choices[i] for i in order)
        assert moved.question == f"What is it?\n{options_block(moved.choices)}{LETTER_INSTRUCTION}"
        assert moved.choices[letters(3).index(moved.answers[0])] == "a red car"
        assert (moved.id, moved.image_key) == (item.id, item.image_key)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Which?\n(A) cat\n(B) dog\n\nAnswer.", "Which?\n(A) dog\n(B) cat\n\nAnswer."),
        ("Which?\nOptions: A: cat, B: dog", "Which?\nOptions: A: dog, B: cat"),
    ],
)
def test_options_are_found_where_tasks_write_them(question: str, expected: str) -> None:
    item = choice_item(("cat", "dog"), question=question)
    assert permuted(item, (1, 0)).question == expected


def test_items_without_places_or_reference_are_not_attacked() -> None:
    attack = OptionPermutation()
    assert attack.applies_to(choice_item(("cat", "dog")))
    assert attack.applies_to(choice_item(("cat", "dog"), "dog"))
    assert not attack.applies_to(choice_item(("cat", "dog"), question="Which?\nA. cat\nB. bird"))
    assert not attack.applies_to(choice_item(("cat", "dog"), "bird"))
    assert not attack.applies_to(choice_item(("cat",)))
    assert not attack.applies_to(choice_item(("cat", "")))


@pytest.mark.parametrize(
    "choice",
    [
        *(
            "all of the above",
            "None of the above.",
            "both A and B",
            "Both (A) and (C)",
            "neither A nor B",
            "none of these",
        ),
        *("A and C", "A, B and C", "B & D only", "Neither.", "all of these options"),
    ],
)
def test_options_that_speak_of_others_are_seen(choice: str) -> None:
    assert refers_to_others(choice)


@pytest.mark.parametrize(
    "choice",
    ["a cat", "the bird above the house", "both hands", "vitamin A and B12", "a, cat and dog", "Asia and Africa", "A"],
)
def test_ordinary_options_are_not(choice: str) -> None:
    assert not refers_to_others(choice)


def _concluded(item: EvaluationItem, answer: object) -> tuple[int, dict[str, object]]:
    """What the attack makes of a model that is a function of the posed item."""
    attack = OptionPermutation()
    posed = attack.pose(item, (), None, None, 0)  # type: ignore[arg-type]
    scored = [score_letter(answer(one.item), one.item) for one in posed]  # type: ignore[operator]
    index, facts = attack.conclude(posed, scored)
    assert attack.asked(item, {"attack_facts": facts}) == posed[index].item
    return index, facts


def test_a_model_that_reads_the_options_is_consistent_and_right_in_the_worst_case() -> None:
    item = choice_item(("red", "green", "blue", "grey"), "B")
    index, facts = _concluded(item, lambda asked: letters(4)[asked.choices.index("green")])
    assert index == 0
    assert (facts["mean_score"], facts["consistent"], facts["n_orders"]) == (1.0, True, 24)
    assert facts["by_gold_letter"] == {letter: [6.0, 6] for letter in "ABCD"}


def test_a_model_that_always_says_a_is_right_by_place_and_never_in_the_worst_case() -> None:
    item = choice_item(("red", "green", "blue"), "A")
    index, facts = _concluded(item, lambda asked: "A")
    assert index > 0
    assert facts["mean_score"] == pytest.approx(1 / 3)
    assert facts["consistent"] is False
    assert facts["by_gold_letter"] == {"A": [2.0, 2], "B": [0.0, 2], "C": [0.0, 2]}
    assert facts["contents"]["BCA"] == "B"  # type: ignore[index]


def test_answers_without_a_letter_are_not_consistent() -> None:
    _, facts = _concluded(choice_item(("red", "green")), lambda asked: "who knows")
    assert facts["consistent"] is False


def test_letter_bias_is_scipys_chi_square_and_leaves_referring_items_out() -> None:
    def record(hits: dict[str, list[float]], refers: bool = False) -> dict[str, object]:
        return {"attack_facts": {"by_gold_letter": hits, "refers_to_others": refers}}

    records = [
        record({"A": [6, 6], "B": [3, 6], "C": [1, 6]}),
        record({"A": [5, 6], "B": [4, 6], "C": [2, 6]}),
        record({"A": [0, 6], "B": [6, 6], "C": [6, 6]}, refers=True),
        {"error": {}},
    ]
    found = letter_bias(records)
    assert found is not None
    expected = stats.chi2_contingency(np.array([[11, 1], [7, 5], [3, 9]]), correction=False)
    assert (found["chi2"], found["p"], found["dof"]) == (expected.statistic, expected.pvalue, 2)
    assert found["right"] == {"A": 11, "B": 7, "C": 3}
    constant = letter_bias([record({"A": [6, 6], "B": [6, 6]})])
    assert constant is not None
    assert constant["p"] is None
    assert letter_bias([]) is None
