"""Times contenders in turn, in one process.

On a shared machine absolute times drift by tens of per cent within minutes, so nothing here is compared across
processes: contenders alternate within milliseconds, and what is reported are medians of their times and of the
differences between neighbours.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

__all__ = ["Case", "Plan", "Result", "Timing", "Work", "measure"]

Work = Callable[[], Sequence[Tensor]]
"""Does the work once and returns what it computed."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Contenders on one set of sizes; a row of the table."""

    settings: Mapping[str, int | str]
    contenders: Mapping[str, Work]
    """By name. The first is the baseline; the first result of each must be the baseline's."""
    limits: Mapping[str, Work] = field(default_factory=dict)
    """By name, work of other results that is timed beside the contenders: theirs are given as multiples of the fastest.
    """
    references: Mapping[str, Work] = field(default_factory=dict)
    """By name, work of other results that is timed beside the contenders and shown as theirs is."""
    whole: tuple[str, Work] | None = None
    """Name and work of what the contenders are a part of, which gives their times a scale; None: the baseline."""
    items: tuple[str, int] | None = None
    """What each contender's work gets through, and how many of it; results are then given as throughput."""
    by_other_processes: bool = False
    """Whether others do the work, so that only the clock on the wall tells how long it takes."""
    tolerance: float = 0.0
    """Largest difference of a result from the baseline's, relative to the largest entry of that."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much to sample."""

    rounds: int
    alternations: int
    """Samples of each contender in a round; the whole gets one."""
    seconds: float
    """Shorter work is repeated within a sample until it takes this long."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What one contender took: medians over its samples, in seconds."""

    seconds: float
    difference: float
    """From the baseline's sample beside it."""
    difference_error: float
    """1.96 standard errors of the median of normal differences: 1.82 interquartile ranges / sqrt(samples)."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Timings of a case."""

    timings: Mapping[str, Timing]
    whole: float
    """Median seconds of the case's whole."""
    limit: float | None = None
    """Median seconds of the fastest limit, if the case has any."""


def measure(case: Case, plan: Plan, device: torch.device) -> Result:
    """Times every contender of a case on a device.

    Raises:
        AssertionError: a contender's result is not the baseline's.
    """
    _check_results(case)
    now = time.perf_counter if case.by_other_processes else _clock(device)
    works = {**case.limits, **case.references, **case.contenders}
    samplers = {name: _sampler(work, plan.seconds, now) for name, work in works.items()}
    sample_whole = _sampler(case.whole[1], plan.seconds, now) if case.whole else None
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    whole = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(plan.rounds):
            if sample_whole:
                whole.append(sample_whole())
            for number in range(plan.alternations):
                # To and fro: what drifts within an alternation then hits the first and the last alike.
                for name in samplers if number % 2 == 0 else reversed(samplers):
                    samples[name].append(samplers[name]())
    finally:
        gc.enable()
    baseline = samples[next(iter(case.contenders))]
    timings = {name: _timing(values, baseline) for name, values in samples.items()}
    limit = min((timings[name].seconds for name in case.limits), default=None)
    return Result(timings=timings, whole=float(np.median(whole or baseline)), limit=limit)


def _timing(values: Sequence[float], baseline: Sequence[float]) -> Timing:
    low, middle, high = np.quantile(np.subtract(values, baseline), (0.25, 0.5, 0.75)).tolist()
    return Timing(
        seconds=float(np.median(values)),
        difference=middle,
        difference_error=1.82 * (high - low) / math.sqrt(len(values)),
    )


@torch.no_grad()
def _check_results(case: Case) -> None:
    with torch.enable_grad():
        results = {name: work() for name, work in case.contenders.items()}
    baseline, expected = next(iter(results.items()))
    for name, tensors in results.items():
        for found, wanted in zip(tensors, expected, strict=True):
            limit = case.tolerance * float(wanted.abs().max())
            difference = float((found.double() - wanted.double()).abs().max())
            message = f"{dict(case.settings)}: {name} differs from {baseline} by {difference:.3g}, allowed {limit:.3g}"
            assert difference <= limit, message


def _sampler(work: Work, seconds: float, now: Callable[[], float]) -> Callable[[], float]:
    """A function that times the work once more; run twice here, to warm up and to see how often to repeat it."""

    def sample(repeats: int) -> float:
        start = now()
        for _ in range(repeats):
            work()
        return (now() - start) / repeats

    sample(1)
    repeats = max(1, math.ceil(seconds / max(sample(1), 1e-7)))
    return lambda: sample(repeats)


def _clock(device: torch.device) -> Callable[[], float]:
    """Processor time of a single thread, which other programs cannot stretch; else the clock on the wall."""
    if device.type == "cpu":
        return time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def now() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return now
