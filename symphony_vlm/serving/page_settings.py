"""How an answer is drawn: the settings of a page, checked before the model sees them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from symphony_vlm.errors import InputError

__all__ = ["MAX_NEW_TOKENS", "MAX_SEED", "MAX_TEMPERATURE", "Sampling"]

MAX_NEW_TOKENS = 512
MAX_TEMPERATURE = 2.0
MAX_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The settings of one answer."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_p: float = 1.0
    """Tokens are drawn among the likeliest that together have this probability."""
    seed: int | None = None
    """Makes drawn answers repeatable; None: each one differs."""

    @classmethod
    def read(cls, max_new_tokens: Any, temperature: Any, top_p: Any, seed: Any) -> Sampling:
        """From what a browser sent, which may be anything; a seed of -1 is none.

        Raises:
            InputError: a value is no number, or out of its range.
        """
        length = _number(max_new_tokens, "longest answer", 1, MAX_NEW_TOKENS)
        drawn_from = int(_number(-1 if seed is None else seed, "seed", -1, MAX_SEED))
        share = _number(top_p, "top-p", 0, 1)
        if share == 0:
            raise InputError("0 must be above 0", where="top-p")
        heat = _number(temperature, "temperature", 0, MAX_TEMPERATURE)
        return cls(
            max_new_tokens=int(length), temperature=heat, top_p=share, seed=None if drawn_from < 0 else drawn_from
        )

    def arguments(self) -> dict[str, Any]:
        """For `ChatSession.stream`; a seed is set here and now, so begin the answer next."""
        if self.temperature > 0 and self.seed is not None:
            import torch

            torch.manual_seed(self.seed)
        drawn = {"top_p": self.top_p} if self.temperature > 0 else {}
        return {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, **drawn}


def _number(value: Any, name: str, lowest: float, highest: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not lowest <= number <= highest:
        shown = repr(value)
        shown = shown if len(shown) <= 40 else f"{shown[:39]}…"
        raise InputError(f"{shown} is not a number from {lowest:g} to {highest:,}", where=name)
    return number
