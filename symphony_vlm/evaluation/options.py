"""What a multiple choice offers a model that scores options by likelihood in place of writing an answer."""

from __future__ import annotations

from dataclasses import dataclass

from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.rules.letters import letters

__all__ = ["Options", "options_of"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The continuations of a prompt whose likelihoods are compared."""

    texts: tuple[str, ...]
    """What the model might answer."""
    answers: tuple[str, ...]
    """The prediction that each stands for."""
    question: str | None = None
    """Asked in place of the item's question."""


def options_of(item: EvaluationItem) -> Options | None:
    """The letters, where the reference is one of them, as the prompt then asks for; else the options' texts.

    Returns:
        None for an item without options: its answer is generated.
    """
    if not item.choices:
        return None
    names = tuple(letters(len(item.choices)))
    texts = names if item.answers and item.answers[0] in names else tuple(text.strip() for text in item.choices)
    return Options(texts=texts, answers=texts)
