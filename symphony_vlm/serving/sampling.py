"""The next token of every row of a batch, each by its own request's settings.

Shape letters: B rows, N rows that draw, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

__all__ = ["RowSampler", "SamplingSettings", "draw"]

_COLDEST = 1e-6
"""Temperatures below give the likeliest token: divided by them, differences of logits would leave fp32."""


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How one answer is generated."""

    max_tokens: int
    temperature: float = 0.0
    """0: the likeliest token each time."""
    top_p: float = 1.0
    """Draws from the likeliest tokens that have this much of the probability together; the first always counts."""
    seed: int | None = None
    """Equal seeds give equal answers; None draws one."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""


class RowSampler(LogitsProcessor):
    """Leaves of every row's scores the one token that its request's settings choose, for ``do_sample=False``.

    Every row has random numbers of its own, one a step, so that its tokens depend on its seed and its scores alone.

    Args:
        settings: of each row.
    """

    def __init__(self, settings: Sequence[SamplingSettings]) -> None:
        self._drawing = [row for row, setting in enumerate(settings) if setting.temperature >= _COLDEST]
        self._temperatures = [settings[row].temperature for row in self._drawing]
        self._top_ps = [settings[row].top_p for row in self._drawing]
        self._generators = [_generator(settings[row].seed) for row in self._drawing]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``[B, V]`` to 0 for the chosen token and -inf for all others."""
        chosen_B = scores.argmax(-1)
        if self._drawing:
            columns = [self._temperatures, self._top_ps, [generator.random() for generator in self._generators]]
            temperatures_N, top_ps_N, uniforms_N = torch.tensor(columns, dtype=torch.float32).to(scores.device)
            rows_N = torch.tensor(self._drawing, device=scores.device)
            chosen_B[rows_N] = draw(scores[rows_N], temperatures_N, top_ps_N, uniforms_N)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen_B[:, None], 0.0)


def draw(scores_NV: Tensor, temperatures_N: Tensor, top_ps_N: Tensor, uniforms_N: Tensor) -> Tensor:
    """Token ids ``[N]`` drawn by nucleus sampling (arXiv 1904.09751), by inverting the distribution function.

    Args:
        scores_NV: logits; -inf for what must not come.
        temperatures_N: above 0.
        top_ps_N: from 0 to 1.
        uniforms_N: random numbers in [0, 1).
    """
    logits_NV = scores_NV.float()
    logits_NV = (logits_NV - logits_NV.amax(-1, keepdim=True)) / temperatures_N[:, None]
    # Stable, so that equal probabilities stand in the same order on every device.
    ordered_NV, order_NV = torch.sort(logits_NV.softmax(-1), dim=-1, descending=True, stable=True)
    before_NV = ordered_NV.cumsum(-1) - ordered_NV
    kept_NV = before_NV < top_ps_N[:, None]
    kept_NV[:, 0] = True
    sums_NV = (ordered_NV * kept_NV).cumsum(-1)
    place_N1 = (sums_NV <= uniforms_N[:, None] * sums_NV[:, -1:]).sum(-1, keepdim=True)
    # Rounding may carry the product up to the whole sum.
    last_N1 = (kept_NV & (ordered_NV > 0)).sum(-1, keepdim=True) - 1
    return order_NV.gather(-1, place_N1.clamp(max=last_N1))[:, 0]


def _generator(seed: int | None) -> np.random.Generator:
    return np.random.default_rng(secrets.randbits(64) if seed is None else seed % 2**64)
