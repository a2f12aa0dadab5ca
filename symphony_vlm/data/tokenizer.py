"""Trains a small byte-level BPE tokenizer, for language models that are themselves trained here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["IMAGE_TOKEN", "ensure_special_tokens", "train_tokenizer"]

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<|pad|>"


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, special_tokens: Iterable[str] = (), end_token: str
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text can be represented, and decoding gives it back exactly.

    Args:
        texts: the training text.
        vocab_size: at most so many tokens, special ones included.
        special_tokens: a template's markers.
        end_token: the token that ends an answer; becomes the tokenizer's EOS.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys([PAD_TOKEN, end_token, IMAGE_TOKEN, *special_tokens]))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=end_token,
        extra_special_tokens=[token for token in special if token not in (PAD_TOKEN, end_token)],
        clean_up_tokenization_spaces=False,
    )


def ensure_special_tokens(tokenizer: PreTrainedTokenizerFast) -> int:
    """Adds the image placeholder (and a pad token where there is none) to a pretrained tokenizer.

    Returns:
        How many tokens were added; the language model's embedding must grow if the vocabulary outgrows it.
    """
    added = tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token_id is None:
        added += tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return int(added)
