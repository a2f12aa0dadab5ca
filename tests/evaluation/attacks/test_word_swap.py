"""Word swap: which words, how many, the same ones every time, and nothing else touched."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.attacks import word_swap as module
from symphony_vlm.evaluation.attacks.word_swap import STOP_WORDS_SHA256, decimal_text, stop_words, word_swap

LINE = "The quick brown fox jumps over the lazy dog near a river bank while seven tall trees stand quietly behind it ."


def test_a_line_loses_rate_times_words_eligible_words_and_keeps_everything_else() -> None:
    found = word_swap(LINE, 0.2)
    words, after = LINE.split(" "), found.text.split(" ")
    assert found.n_words == len(words) - 1, "the full stop is no word"
    assert found.n_swapped == int(0.2 * found.n_words) == 4
    changed = [old for old, new in zip(words, after, strict=True) if old != new]
    assert len(changed) == 4
    assert not set(changed) & stop_words()
    assert [found.text[start:end] for start, end in found.spans] == ["AAA"] * 4
    assert found.realised_rate == 4 / 21


def test_every_line_with_words_loses_at_least_one_and_empty_lines_stay() -> None:
    found = word_swap(" = Valkyria Chronicles III = \n\n the of and \n", 0.015)
    first, empty, stop, last = found.text.split("\n")
    assert first.count("AAA") == 1
    assert first.startswith(" = ")
    assert (empty, stop, last) == ("", " the of and ", "")
    assert found.n_words == 6
    assert found.n_eligible == 3
    assert found.realised_rate == pytest.approx(1 / 6)


def test_words_are_word_characters_with_marks_that_are_stripped_at_both_ends() -> None:
    text = "'don't-stop' --x_y@-@z-- <unk> AAA unk (Über*) ... - 42"
    found = word_swap(text, 1.0)
    assert found.text == "'AAA' --AAA-- <unk> AAA AAA (AAA*) ... - AAA"
    assert (found.n_words, found.n_eligible, found.n_swapped) == (7, 5, 5)


def test_stop_words_are_compared_in_lower_case_only() -> None:
    assert word_swap("The cat the", 1.0).text == "AAA AAA the"


def test_equal_arguments_give_equal_texts_and_each_part_of_the_key_counts() -> None:
    base = word_swap(LINE, 0.1, seed=1, line_index=4)
    assert word_swap(LINE, 0.1, seed=1, line_index=4) == base
    for changes in ({"seed": 2}, {"line_index": 5}, {"rate": 0.104}):
        assert word_swap(LINE, **({"rate": 0.1, "seed": 1, "line_index": 4} | changes)).text != base.text  # type: ignore[arg-type]


def test_lines_of_a_text_are_those_of_their_indices() -> None:
    text = f"{LINE}\n{LINE}\nother words"
    found = word_swap(text, 0.1, line_index=7)
    alone = [word_swap(line, 0.1, line_index=7 + number) for number, line in enumerate(text.split("\n"))]
    assert found.text == "\n".join(one.text for one in alone)
    assert alone[0].text != alone[1].text
    assert [found.text[start:end] for start, end in found.spans] == ["AAA"] * sum(one.n_swapped for one in alone)


def test_the_exact_profile_swaps_each_eligible_word_with_the_rate() -> None:
    found = [word_swap(LINE, 0.3, profile="exact", seed=seed) for seed in range(400)]
    counts = np.array([one.n_swapped for one in found])
    n, rate = found[0].n_eligible, 0.3
    # Four standard errors of the mean of 400 binomials: a false alarm in 16,000 seeds, and the seeds are fixed.
    assert abs(counts.mean() - n * rate) < 4 * np.sqrt(n * rate * (1 - rate) / len(counts))
    assert counts.min() < n * rate < counts.max()


def test_draws_come_from_the_keyed_generator_of_the_specification() -> None:
    """The material written out by hand, against the function."""
    line, index, rate, seed = "alpha beta gamma delta epsilon", 3, 0.4, 9
    key = hashlib.sha256(f"{line}\n{index}".encode()).hexdigest()
    material = f"symphony-vlm/corruption/1\n{key}\nword_swap\n0.4\n{seed}"
    words = np.frombuffer(hashlib.sha256(material.encode("ascii")).digest(), dtype="<u4")
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([int(w) for w in words])))
    chosen = set(rng.permutation(5)[:2].tolist())
    expected = " ".join("AAA" if i in chosen else word for i, word in enumerate(line.split()))
    assert word_swap(line, rate, seed=seed, line_index=index).text == expected


def test_the_stop_word_list_is_the_one_that_the_manifest_names(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(module.__file__).with_name("stop_words.txt")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == STOP_WORDS_SHA256
    assert len(stop_words()) == 179
    stop_words.cache_clear()
    monkeypatch.setattr(module, "STOP_WORDS_SHA256", "0" * 64)
    with pytest.raises(InputError, match="not the list of this version"):
        stop_words()
    monkeypatch.undo()
    stop_words.cache_clear()


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, float("nan")])
def test_a_rate_must_be_a_share(rate: float) -> None:
    with pytest.raises(InputError, match=re.escape("above 0 and at most 1")):
        word_swap(LINE, rate)


def test_rates_are_written_without_an_exponent() -> None:
    assert [decimal_text(rate) for rate in (0.015, 1, 0.00001)] == ["0.015", "1.0", "0.00001"]


def test_it_needs_no_torch() -> None:
    code = "import sys, symphony_vlm.evaluation.attacks.word_swap; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
