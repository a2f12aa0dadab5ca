"""Two stages trained in turn in one process, block by block, for differences smaller than the drift between processes.

Each trainer runs its own loop, the same one that `symphony-vlm train` runs, in a thread of its own; a baton lets one of
them run at a time and changes hands between steps.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["Blocks", "compare", "train_in_turn"]


@dataclass
class Blocks(TrainerCallback):
    """Times blocks of steps, and waits for its turn between them. To be the last of a trainer's callbacks."""

    steps: int
    """Of a block."""
    turns: Sequence[int]
    """Whose turn it is, block by block, of all trainers."""
    me: int
    turn: threading.Condition
    state: list[int]
    """How many blocks are done; shared."""
    seconds: list[float] = field(default_factory=list)
    _began: float = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            self.seconds.append(_now() - self._began)
            self.pass_on()
            if state.global_step < state.max_steps:
                self._begin()

    def pass_on(self, blocks: int = 1) -> None:
        """Ends blocks."""
        with self.turn:
            self.state[0] += blocks
            self.turn.notify_all()

    def _begin(self) -> None:
        with self.turn:
            self.turn.wait_for(lambda: self.state[0] >= len(self.turns) or self.turns[self.state[0]] == self.me)
        self._began = _now()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def train_in_turn(trainers: Sequence[Trainer], *, steps: int, blocks: int) -> list[list[float]]:
    """Trains both to their end.

    Args:
        trainers: two, each with ``steps * blocks`` steps.
        steps: of a block.
        blocks: of each.

    Returns:
        seconds of each trainer's blocks.
    """
    # To and fro (0 1 1 0 0 1 ...): what drifts then hits both alike.
    turns = [(index + number) % 2 for number in range(blocks) for index in (0, 1)]
    turn, state = threading.Condition(), [0]
    callbacks = [Blocks(steps=steps, turns=turns, me=me, turn=turn, state=state) for me in range(2)]
    errors: list[BaseException] = []

    def run(trainer: Trainer, callback: Blocks) -> None:
        try:
            trainer.train()
        except BaseException as error:
            errors.append(error)
            callback.pass_on(len(turns))  # the other shall not wait for ever

    threads = []
    for trainer, callback in zip(trainers, callbacks, strict=True):
        trainer.add_callback(callback)
        threads.append(threading.Thread(target=run, args=(trainer, callback)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [callback.seconds for callback in callbacks]


def compare(baseline: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Ratio of the other's time to the baseline's, from pairs of neighbouring blocks.

    Returns:
        the median, and 1.96 standard errors of a median of normal values: 1.82 interquartile ranges / sqrt(pairs).
    """
    ratios = np.divide(other, baseline)
    low, high = np.quantile(ratios, (0.25, 0.75)).tolist()
    return {"ratio": statistics.median(ratios.tolist()), "error": 1.82 * (high - low) / math.sqrt(len(ratios))}
