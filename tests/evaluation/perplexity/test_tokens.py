"""Tokens know their line and word, whatever the tokenizer; swapped words are known by their tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.perplexity.texts import Attack, attacked, clean, in_vocabulary
from symphony_vlm.evaluation.perplexity.tokens import tokenise

LINES = ["", " = T = ", "", "the red circle , is above <unk> .", "  blue   star", "an end"]


@pytest.fixture(params=["sparse_folder", "stock_folder"])
def tokenizer(request: pytest.FixtureRequest) -> object:
    """Word-level, and byte-level BPE."""
    return AutoTokenizer.from_pretrained(request.getfixturevalue(request.param))


def test_tokens_belong_to_lines_and_words_are_those_between_white_space(tokenizer: object) -> None:
    text = "".join(f"{line}\n" for line in LINES)
    tokens = tokenise(text, tokenizer)
    assert tokens.num_lines == len(LINES)
    for number in range(len(LINES)):
        ids = tokens.ids_N[tokens.lines_N == number].tolist()
        expected = tokenizer(f"{LINES[number]}\n")["input_ids"]  # type: ignore[operator]
        assert ids == expected, number
    counts = tokens.per_line(np.full(len(tokens.ids_N), -1.0))
    assert counts.words.tolist() == [len(line.split()) + 1 for line in LINES]
    assert counts.nll.tolist() == counts.tokens.tolist() == np.bincount(tokens.lines_N).tolist()


def test_a_word_counts_only_if_all_its_tokens_are_scored(stock_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stock_folder)
    tokens = tokenise("zebra red\n", tokenizer)
    scores = np.full(len(tokens.ids_N), -2.0)
    scores[0] = np.nan  # the first token of zebra, which has several
    assert len(tokenizer("zebra")["input_ids"]) > 1
    counts = tokens.per_line(scores)
    assert counts.words.tolist() == [2] and counts.tokens.tolist() == [len(scores) - 1]
    assert counts.nll.tolist() == [2.0 * (len(scores) - 1)]


def test_swapped_words_are_left_out_with_all_their_tokens_and_nothing_else(tokenizer: object) -> None:
    swapped = attacked(LINES, Attack(rate=0.3, token="AAA", seed=3))
    tokens = tokenise(swapped.text, tokenizer, swapped.spans)
    texts = [swapped.text[a:b] for a, b in swapped.spans]
    assert texts == ["AAA"] * swapped.n_swapped and swapped.n_swapped >= 3
    offsets = tokenizer(swapped.text, return_offsets_mapping=True)["offset_mapping"]  # type: ignore[operator]
    inside = [any(a < e and s < b for s, e in swapped.spans) for a, b in offsets]
    assert tokens.swapped_N.tolist() == inside and any(inside) and not all(inside)


def test_equal_seeds_give_equal_bytes_and_every_line_is_attacked_by_itself() -> None:
    attack = Attack(rate=0.2, seed=5)
    first = attacked(LINES * 20, attack)
    assert first == attacked(LINES * 20, attack) and first.sha256 == attacked(LINES * 20, attack).sha256
    # Pinned, so that another machine or version that draws otherwise is noticed.
    assert first.sha256[:16] == "8adecd3a0adbf93b"
    assert first.text != attacked(LINES * 20, Attack(rate=0.2, seed=6)).text
    lines = first.text.split("\n")
    assert lines[0] == "" and len(lines) == 121
    # Equal lines at other places are attacked elsewhere.
    assert len({lines[3 + 6 * i] for i in range(20)}) > 1
    assert first.realised_rate == first.n_swapped / first.n_words > 0.2
    # Stop words and <unk> stay.
    assert all(line.startswith("the ") and " is above <unk> ." in line for line in lines[3::6])
    assert clean(LINES).text == "".join(f"{line}\n" for line in LINES)


def test_whether_the_token_is_in_the_vocabulary(sparse_folder: Path, stock_folder: Path) -> None:
    words, pieces = (AutoTokenizer.from_pretrained(folder) for folder in (sparse_folder, stock_folder))
    assert not in_vocabulary("AAA", words) and in_vocabulary("red", words) and in_vocabulary("AAA", pieces)


def test_a_text_of_one_token_is_refused(sparse_folder: Path) -> None:
    with pytest.raises(InputError, match="makes 1 tokens"):
        tokenise("red", AutoTokenizer.from_pretrained(sparse_folder))
