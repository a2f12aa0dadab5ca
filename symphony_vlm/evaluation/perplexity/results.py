"""The figures of a text, clean or attacked, from the costs of its lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from symphony_vlm.evaluation.perplexity.intervals import PairedDifference, paired_per_word, ratios
from symphony_vlm.evaluation.perplexity.lines_file import cell_name, line_nats
from symphony_vlm.evaluation.perplexity.texts import Attack, AttackedText
from symphony_vlm.evaluation.perplexity.tokens import LineCounts
from symphony_vlm.evaluation.statistics import percentile_interval

__all__ = ["CellFigures", "cell_figures", "paired", "paired_dict"]


@dataclass(frozen=True, kw_only=True)
class CellFigures:
    """Perplexity of a text under a model, and everything needed to read it rightly."""

    attack: Attack | None
    values: dict[str, tuple[float, float, float]]
    """By metric the value and its interval's ends."""
    n_tokens: int
    n_tokens_scored: int
    n_words: int
    realised_rate: float
    n_swapped: int
    text_sha256: str

    @property
    def name(self) -> str:
        """``clean``, or ``word_swap@0.015``."""
        return cell_name(None if self.attack is None else self.attack.rate)

    @property
    def coverage(self) -> float:
        """Share of the text's tokens that are scored."""
        return self.n_tokens_scored / self.n_tokens

    def to_dict(self) -> dict[str, Any]:
        """The contract's summary of ``perplexity --json``, with more of the same."""
        value, low, high = self.values["perplexity"]
        kept, word = self.values["perplexity_without_swapped"], self.values["word_perplexity"]
        return {
            "perplexity": value,
            "nats_per_token": self.values["nats_per_token"][0],
            "n_tokens": self.n_tokens_scored,
            "attack": None if self.attack is None else "word_swap",
            "rate": 0.0 if self.attack is None else self.attack.rate,
            "realised_rate": self.realised_rate,
            "ci_low": low,
            "ci_high": high,
            "word_perplexity": word[0],
            "n_words": self.n_words,
            "perplexity_without_swapped": kept[0],
            "coverage": self.coverage,
            "n_swapped": self.n_swapped,
            "text_sha256": self.text_sha256,
        }

    def rows(self, common: dict[str, Any]) -> list[dict[str, Any]]:
        """Rows of results.json."""
        return [
            {
                **common,
                "corruption": "none" if self.attack is None else "word_swap",
                "severity": 0 if self.attack is None else self.attack.rate,
                "metric": metric,
                "value": value,
                "higher_is_better": False,
                "ci_low": low,
                "ci_high": high,
                "n_items": self.n_tokens_scored,
                "n_words": self.n_words,
                "coverage": self.coverage,
                "realised_rate": self.realised_rate,
                "n_errors": 0,
            }
            for metric, (value, low, high) in self.values.items()
        ]


def cell_figures(
    text: AttackedText,
    attack: Attack | None,
    counts: LineCounts,
    n_tokens: int,
    clusters: Sequence[str],
    *,
    seed: int,
) -> CellFigures:
    """All figures of one text.

    Per token, per word (of white space, line ends among them, as WikiText counts), and per token without those of
    swapped words, each with a cluster bootstrap.
    """
    scored = counts.tokens > 0
    names = [name for name, is_scored in zip(clusters, scored, strict=True) if is_scored]
    top = np.stack([counts.nll, counts.nll, counts.kept_nll], axis=1)[scored]
    bottom = np.stack([counts.tokens, counts.words, counts.kept_tokens], axis=1)[scored]
    value_M, replicates_RM = ratios(top, bottom, names, seed=seed)
    values: dict[str, tuple[float, float, float]] = {}
    for column, metric in enumerate(("perplexity", "word_perplexity", "perplexity_without_swapped")):
        nats = percentile_interval(value_M[column], replicates_RM[:, column])
        if metric == "perplexity":
            values["nats_per_token"] = (nats.value, nats.low, nats.high)
        values[metric] = (math.exp(nats.value), math.exp(nats.low), math.exp(nats.high))
    return CellFigures(
        attack=attack,
        values=values,
        n_tokens=n_tokens,
        n_tokens_scored=int(counts.tokens.sum()),
        n_words=int(counts.words.sum()),
        realised_rate=text.realised_rate,
        n_swapped=text.n_swapped,
        text_sha256=text.sha256,
    )


def paired(
    first: dict[int, dict[str, Any]], second: dict[int, dict[str, Any]], where: str, *, seed: int
) -> PairedDifference:
    """Nats per word of one cell minus another on the same lines, see `lines_file.line_nats`."""
    a_I, b_I, words_I, clusters = line_nats(first, second, where)
    return paired_per_word(a_I, b_I, words_I, clusters, seed=seed)


def paired_dict(found: PairedDifference, first: str, second: str) -> dict[str, Any]:
    """For results.json."""
    interval = found.interval
    return {
        "first": first,
        "second": second,
        "nats_per_word": interval.value,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "word_perplexity_ratio": math.exp(interval.value),
        "p_value": found.p_value,
        "n_lines": found.n_lines,
        "n_clusters": found.n_clusters,
    }
