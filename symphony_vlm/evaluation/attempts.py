"""Work on batches in which a single thing may fail, or which may be too large for the device."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

__all__ = ["Failure", "attempt"]

_log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Failure:
    """What became of a thing that failed."""

    type: str
    message: str
    out_of_memory: bool = False

    @staticmethod
    def of(error: Exception) -> Failure:
        """The exception without its traceback, whose frames hold tensors."""
        return Failure(type(error).__name__, str(error), isinstance(error, torch.OutOfMemoryError))


def attempt(
    work: Callable[[Sequence[T]], Sequence[R]],
    things: Sequence[T],
    too_large: Callable[[int], None] = lambda size: None,
) -> list[R | Failure]:
    """``work(things)``; where it raises, the halves apart, down to the single things that fail.

    That smaller batches succeed where a larger one failed with another error than of memory is no thing's fault, and
    would only show as slowness: it is logged.

    Args:
        work: A result for each thing.
        things: What to work on.
        too_large: Called with a number of things for which the memory of the device was too small.

    Returns:
        For each thing the result, or why there is none.
    """
    if not things:
        return []
    try:
        results = list(work(things))
    except Exception as error:
        failure = Failure.of(error)
    else:
        if len(results) != len(things):
            raise RuntimeError(f"{len(results)} results for {len(things)} things")
        return list(results)
    # Out here the frames of the failed pass are gone, and what they held.
    if failure.out_of_memory:
        too_large(len(things))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if len(things) == 1:
        return [failure]
    middle = len(things) // 2
    halves = attempt(work, things[:middle], too_large) + attempt(work, things[middle:], too_large)
    if not failure.out_of_memory and not any(isinstance(result, Failure) for result in halves):
        _log.warning(
            "a batch of %d failed, and its halves did not: the answers are complete, but slow (%s: %s)",
            len(things), failure.type, failure.message,
        )  # fmt: skip
    return halves
