"""A text as tokens, each with the line it belongs to, and how many words the scored ones make up.

Shape letters: N tokens, U units: words between white space, and line ends.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from symphony_vlm.errors import InputError

__all__ = ["LineCounts", "TokenisedText", "tokenise"]

_UNIT = re.compile(r"[^\s]+|\n")
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class LineCounts:
    """Sums over the scored tokens of each line."""

    nll: NDArray[np.float64]
    """Negative log-probability in nats."""
    tokens: Ints
    words: Ints
    """Words and line ends whose tokens are all scored."""
    kept_nll: NDArray[np.float64]
    """Without tokens of swapped words."""
    kept_tokens: Ints


@dataclass(frozen=True, kw_only=True)
class TokenisedText:
    """A text's tokens and where they stand in it."""

    ids_N: Tensor
    lines_N: Ints
    units_N: Ints
    swapped_N: NDArray[np.bool_]
    """Tokens that overlap a swapped word."""
    unit_lines_U: Ints
    num_lines: int

    def per_line(self, log_probabilities_N: NDArray[np.float64]) -> LineCounts:
        """Sums by line of tokens' log-probabilities, NaN where a token is not scored."""
        scored_N = ~np.isnan(log_probabilities_N)
        nll_N = -np.where(scored_N, log_probabilities_N, 0.0)
        kept_N = scored_N & ~self.swapped_N

        def by_line(weights_N: NDArray[Any]) -> NDArray[np.float64]:
            return np.bincount(self.lines_N, weights=weights_N, minlength=self.num_lines).astype(np.float64)

        complete_U = np.ones(len(self.unit_lines_U), dtype=bool)
        missing = self.units_N[~scored_N]
        complete_U[missing[missing < len(complete_U)]] = False
        return LineCounts(
            nll=by_line(nll_N),
            tokens=by_line(scored_N).astype(np.int64),
            words=np.bincount(self.unit_lines_U[complete_U], minlength=self.num_lines),
            kept_nll=by_line(np.where(kept_N, nll_N, 0.0)),
            kept_tokens=by_line(kept_N).astype(np.int64),
        )


def tokenise(text: str, tokenizer: Any, spans: Sequence[tuple[int, int]] = ()) -> TokenisedText:
    """Tokenises a whole text at once, as transformers' guide does, with the special tokens that the tokenizer adds.

    Args:
        text: lines with their line feeds.
        tokenizer: one of transformers' fast ones, which know where their tokens stand.
        spans: start and end of swapped words, ascending.

    Raises:
        InputError: a slow tokenizer, or a text of less than two tokens.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} does not say where its tokens stand in the text",
            where="tokenizer",
            remedy="Give a model with a fast tokenizer (tokenizer.json).",
        )
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    ids_N = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    if len(ids_N) < 2:
        raise InputError(f"the text makes {len(ids_N)} tokens; at least two are needed", where="--text")
    offsets_N2 = np.asarray(encoded["offset_mapping"], dtype=np.int64)
    _place_special_tokens(offsets_N2, np.asarray(encoded["special_tokens_mask"], dtype=bool), len(text))
    starts_N, ends_N = offsets_N2[:, 0], offsets_N2[:, 1]
    feeds = np.flatnonzero(np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32) == ord("\n"))
    unit_spans = np.asarray([match.span() for match in _UNIT.finditer(text)], dtype=np.int64).reshape(-1, 2)
    return TokenisedText(
        ids_N=ids_N,
        lines_N=np.searchsorted(feeds, starts_N, side="left"),
        # White space in front of a word is often part of its token, and counts with the word.
        units_N=np.searchsorted(unit_spans[:, 1], starts_N, side="right"),
        swapped_N=_overlap(starts_N, ends_N, np.asarray(spans, dtype=np.int64).reshape(-1, 2)),
        unit_lines_U=np.searchsorted(feeds, unit_spans[:, 0], side="left"),
        num_lines=len(feeds) + (not text.endswith("\n")),
    )


def _place_special_tokens(offsets_N2: Ints, special_N: NDArray[np.bool_], length: int) -> None:
    """Those added behind the text stand at its last character; those in front at its first, as they say themselves."""
    behind = len(special_N)
    while behind and special_N[behind - 1]:
        behind -= 1
    offsets_N2[behind:] = length - 1


def _overlap(starts_N: Ints, ends_N: Ints, spans: Ints) -> NDArray[np.bool_]:
    if not len(spans):
        return np.zeros(len(starts_N), dtype=bool)
    # The first span that ends behind the token's start: it overlaps if it begins before the token's end.
    index_N = np.searchsorted(spans[:, 1], starts_N, side="right")
    found_N = index_N < len(spans)
    begins_N = spans[np.minimum(index_N, len(spans) - 1), 0]
    overlaps: NDArray[np.bool_] = found_N & (begins_N < ends_N)
    return overlaps
