"""Stopping at a signal: the step is finished, a checkpoint is saved, and the same command goes on from there.

Slurm and Kubernetes send SIGTERM before they take a machine away; a terminal sends SIGINT (Ctrl-C). The Trainer's own
``enable_jit_checkpoint`` knows SIGTERM only, waits three seconds, saves between the backward pass and the step, and
lets every process decide for itself.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from symphony_vlm.training.writing import several_processes

__all__ = ["StopOnSignal"]


class StopOnSignal(TrainerCallback):
    """Ends training after the step in which any process has received SIGTERM or SIGINT.

    It must come before the callbacks that ask whether a log line or a checkpoint is due. The log gets a line at the
    last step: sums between log lines are in no checkpoint. An evaluation that was due is left out, as time is short.
    """

    def __init__(self) -> None:
        self._received = 0
        self._process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals inside. Only a program's main thread can; elsewhere this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Worker processes of data loaders inherit this. They live as long as this process needs them.
        if os.getpid() != self._process:
            return
        if number == self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = self._received or number
        if number == signal.SIGINT:
            # A handler may run in the middle of a print, so it cannot print.
            os.write(2, b"\nfinishing the step and saving; Ctrl-C again stops at once\n")

    def number(self, device: torch.device) -> int:
        """The signal that any process has received, or 0. All processes must ask together."""
        if not several_processes():
            return self._received
        received = torch.tensor(self._received, device=device)
        dist.all_reduce(received, op=dist.ReduceOp.MAX)
        return int(received)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.number(args.device):
            control.should_log = control.should_save = control.should_training_stop = True
            control.should_evaluate = False
