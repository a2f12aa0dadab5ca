"""The data of a run of language stages: its texts, and the tokenizer that a new model learns from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from symphony_vlm.config.recipe import ModelConfig, Recipe
from symphony_vlm.data.text_lines import TextLines, open_lines
from symphony_vlm.data.tokenizer import train_tokenizer
from symphony_vlm.data.word_tokenizer import LINE_END, train_word_tokenizer, with_line_ends
from symphony_vlm.training.parts import kept_tokenizer, pretrained_tokenizer

__all__ = ["TextData", "open_text_data", "open_text_tokenizer"]


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Texts, each read anew when gone through."""

    train: list[TextLines]
    validation: list[TextLines]

    @property
    def fingerprints(self) -> dict[str, str]:
        """sha256 by the text's name."""
        return {text.name: text.fingerprint for text in (*self.train, *self.validation)}


def open_text_data(recipe: Recipe, report: Callable[[str], None]) -> TextData:
    """Opens the texts of ``data.text``.

    Args:
        recipe: one of language stages.
        report: gets a line per text.

    Raises:
        InputError: a text is not there, or holds none.
    """
    text = recipe.data.text
    assert text is not None
    opened = {}
    for role, sources in (("train", text.train), ("validation", text.validation or [])):
        opened[role] = [open_lines(s.path, subset=s.subset, split=s.split) for s in sources]
        for lines in opened[role]:
            report(f"{lines.name}: {role}, sha256 {lines.fingerprint[:12]}")
    return TextData(train=opened["train"], validation=opened["validation"])


def open_text_tokenizer(model: ModelConfig, folder: Path, data: TextData) -> Any:
    """The pretrained model's tokenizer as it is, or one trained on the training text and kept in ``folder``."""
    if model.language.name is not None and not model.random_weights:
        return pretrained_tokenizer(model)
    size = model.language.vocab_size

    def make() -> Any:
        lines = chain.from_iterable(data.train)
        if model.language.tokenizer == "word_level":
            return train_word_tokenizer(lines, vocab_size=size, min_frequency=model.language.min_frequency)
        return train_tokenizer(with_line_ends(lines), vocab_size=size, end_token=LINE_END)

    return kept_tokenizer(folder, make)
