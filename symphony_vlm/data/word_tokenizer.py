"""The word-level tokenizer of WikiText: words between white space, ``<unk>`` for the rest, ``<eos>`` at line ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Replace("\n", f" {LINE_END} ")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=[UNKNOWN, LINE_END], show_progress=False
    )
    tokenizer.train_from_iterator(with_line_ends(lines), trainer)
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
