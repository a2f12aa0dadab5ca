"""A text clean or attacked, line by line, before any tokenizer sees it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from symphony_vlm.evaluation.attacks.word_swap import Profile, word_swap

__all__ = ["Attack", "AttackedText", "attacked", "clean", "in_vocabulary"]


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Settings of ``word_swap``."""

    rate: float
    token: str = "AAA"
    profile: Profile = "textattack"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class AttackedText:
    """Lines with their line feeds, and what was swapped in them."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    """Start and end of each replacement in `text`."""
    n_words: int = 0
    n_swapped: int = 0
    swapped_by_line: tuple[int, ...] = ()

    @property
    def realised_rate(self) -> float:
        """Swapped words over all words, as the attack counts words."""
        return self.n_swapped / self.n_words if self.n_words else 0.0

    @property
    def sha256(self) -> str:
        """Of the text in UTF-8: equal seeds give equal bytes."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def clean(lines: Sequence[str]) -> AttackedText:
    """The text as it is."""
    return AttackedText(text="".join(f"{line}\n" for line in lines), swapped_by_line=(0,) * len(lines))


def attacked(lines: Sequence[str], attack: Attack) -> AttackedText:
    """Every line attacked by itself. A model then sees and predicts the attacked text."""
    parts: list[str] = []
    spans: list[tuple[int, int]] = []
    by_line: list[int] = []
    n_words = position = 0
    for index, line in enumerate(lines):
        found = word_swap(
            line, attack.rate, token=attack.token, profile=attack.profile, seed=attack.seed, line_index=index
        )
        parts.append(f"{found.text}\n")
        spans += [(position + start, position + end) for start, end in found.spans]
        position += len(parts[-1])
        n_words += found.n_words
        by_line.append(found.n_swapped)
    return AttackedText(
        text="".join(parts),
        spans=tuple(spans),
        n_words=n_words,
        n_swapped=len(spans),
        swapped_by_line=tuple(by_line),
    )


def in_vocabulary(token: str, tokenizer: Any) -> bool:
    """Whether a tokenizer has a way to write a word without its unknown token."""
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    return bool(ids) and tokenizer.unk_token_id not in ids
