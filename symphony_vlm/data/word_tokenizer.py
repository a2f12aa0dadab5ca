"""The word-level tokenizer of WikiText: words between white space, ``<unk>`` for the rest, ``<eos>`` at line ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["LINE_END", "UNKNOWN", "train_word_tokenizer", "with_line_ends"]

UNKNOWN, LINE_END = "<unk>", "<eos>"


def train_word_tokenizer(lines: Iterable[str], *, vocab_size: int, min_frequency: int = 1) -> PreTrainedTokenizerFast:
    """A tokenizer of the words of a text, the most frequent ones if there are too many.

    The line feed is a token of its own, ``<eos>``, so that the text of a whole file gives the stream of tokens that
    word-level models of WikiText are trained on (``words = line.split() + ["<eos>"]``), whoever tokenises it.

    Args:
        lines: the training text, without line ends.
        vocab_size: at most so many tokens, ``<unk>`` and ``<eos>`` among them.
        min_frequency: rarer words are ``<unk>``.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Counted here: the library's WordLevelTrainer numbers special tokens anew that stand in the text, as <unk> does in
    # WikiText, and leaves holes where they were.
    counts = Counter(chain.from_iterable(line.split() for line in lines))
    special = [UNKNOWN, LINE_END]
    frequent = [word for word, count in counts.items() if count >= min_frequency and word not in special]
    # Equally frequent words in the order of the alphabet, so that equal texts give equal numbers.
    words = special + sorted(frequent, key=lambda word: (-counts[word], word))
    vocabulary = {word: number for number, word in enumerate(words[:vocab_size])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Replace("\n", f" {LINE_END} ")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        eos_token=LINE_END,
        pad_token=LINE_END,
        clean_up_tokenization_spaces=False,
    )


def with_line_ends(lines: Iterable[str]) -> Iterator[str]:
    """Each line with its line feed, as tokenizers are trained and asked."""
    return (f"{line}\n" for line in lines)
