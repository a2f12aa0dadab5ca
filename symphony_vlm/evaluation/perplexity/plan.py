"""What a perplexity evaluation does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from symphony_vlm.evaluation.perplexity.texts import Attack

__all__ = ["MIN_ARTICLES", "Clusters", "PerplexityPlan"]

Clusters = Literal["auto", "article", "line"]
MIN_ARTICLES = 10
"""Fewer are too few to be drawn again; lines are taken instead, and the results say so."""


@dataclass(frozen=True, kw_only=True)
class PerplexityPlan:
    """Model, text, windows and attacks."""

    model: str
    """Folder of a causal LM, of a vision-language model, of a finished run, or a hub name."""
    text: str
    """Text file, table or hub data set, see `data.text_lines`."""
    subset: str | None = None
    split: str | None = None
    attacks: tuple[Attack, ...] = ()
    """Besides the clean text."""
    context: int | None = None
    """Tokens in a window; default: as many as the model has positions, at most 1024."""
    stride: int | None = None
    """Default: half the context."""
    streams: int | None = None
    """Published word-level evaluation with that batch size, incomplete windows dropped; default: nothing is."""
    limit_lines: int | None = None
    """The first lines alone."""
    batch_size: int = 8
    clusters: Clusters = "auto"
    """What is drawn again for the intervals; ``auto``: articles if there are at least `MIN_ARTICLES`, else lines."""
    seed: int = 0
    """Of the resamples."""
