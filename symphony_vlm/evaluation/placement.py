"""Corrupts a picture where the evaluation says: as it is, at a common size, or as the model sees it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from symphony_vlm.corruptions import at_long_side, corrupt, corruption_rng
from symphony_vlm.corruptions.placement import MODEL_INPUT, long_side_of
from symphony_vlm.errors import InputError
from symphony_vlm.model.model_input import ModelInput

__all__ = ["SeesSquares", "placed"]


@runtime_checkable
class SeesSquares(Protocol):
    """A model that makes one square of every picture."""

    def model_input(self, pixels: np.ndarray) -> ModelInput:
        """What it sees of uint8 ``[H, W, 3]``.

        Raises:
            InputError: it sees something else, e.g. tiles.
        """


def placed(
    pixels: np.ndarray, key: str, model: object, *, corruption: str, severity: int, seed: int, corrupt_at: str
) -> np.ndarray:
    """The pixels that the model is given, uint8 ``[H', W', 3]``; of the clean cell resized but not corrupted.

    Args:
        pixels: uint8 ``[H, W, 3]``, as decoded.
        key: of the picture, for the generator.
        model: for ``model_input``, which asks it what it sees.
        corruption: its name; any at severity 0.
        severity: 0 to 5.
        seed: of the generator.
        corrupt_at: ``native``, ``long_side:N`` or ``model_input``.

    Raises:
        InputError: ``model_input`` is not defined for the model.
    """

    def corrupted(part: np.ndarray) -> np.ndarray:
        if not severity:
            return part
        return corrupt(part, corruption, severity, corruption_rng(key, corruption, severity, seed))

    if corrupt_at == MODEL_INPUT:
        if not isinstance(model, SeesSquares):
            raise InputError(
                "is defined for models trained here alone; what another model sees is not known",
                where="corrupt_at model_input",
                remedy="Use native or long_side:N.",
            )
        seen = model.model_input(pixels)
        result: np.ndarray = seen.pixels.copy()
        if result[seen.content].size:
            result[seen.content] = corrupted(result[seen.content])
        return result
    length = long_side_of(corrupt_at)
    return corrupted(pixels if length is None else at_long_side(pixels, length))
