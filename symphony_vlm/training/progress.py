"""Progress of a stage: a live display on a terminal, plain lines every few seconds otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from symphony_vlm.training.router_panel import router_line, router_panel
from symphony_vlm.training.router_watch import LayerRouting
from symphony_vlm.training.throughput import short_figures

__all__ = ["ProgressDisplay"]

ONE_LINE = 110
"""Columns from which bar and figures share a line."""
LINES_PER_ROUTER_LINE = 4


class ProgressDisplay(TrainerCallback):
    """Loss, rate, time left, speed and memory; on a terminal also a bar and what the routers do.

    Args:
        console: where it goes.
        stage: its name.
        seconds_between_lines: of plain lines, without a terminal.
        routers: what the routers do now; empty for a dense model.
        show_panel: whether a terminal shows them.
    """

    def __init__(
        self,
        console: Console,
        stage: str,
        *,
        seconds_between_lines: float = 15.0,
        routers: Callable[[], Sequence[LayerRouting]] = tuple,
        show_panel: bool = True,
    ) -> None:
        self._console = console
        self._stage = stage
        self._pause = seconds_between_lines
        self._routers = routers
        self._show_panel = show_panel
        self._live: Live | None = None
        self._loss: float | None = None
        self._figures: list[str] = []
        self._step = self._total = self._num_lines = 0
        self._start = self._last = 0.0
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start, self._first_step = time.monotonic(), state.global_step
        self._last = self._start
        self._step, self._total = state.global_step, state.max_steps
        if not state.is_world_process_zero:
            return
        if self._console.is_terminal:
            # Itself is what is shown, drawn anew four times a second, so that no step waits for a terminal.
            self._live = Live(self, console=self._console, refresh_per_second=4)
            self._live.start()
        elif state.global_step:
            self._console.print(f"{self._stage}: continuing after step {state.global_step}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._step = state.global_step
        if not state.is_world_process_zero or self._live is not None:
            return
        now = time.monotonic()
        if now - self._last < self._pause and state.global_step != state.max_steps:
            return
        self._last = now
        parts = [f"{self._stage}: step {self._step}/{self._total}", *self._notes(), f"{self._seconds_left:.0f} s left"]
        self._console.print("  ".join(parts), markup=False)
        if self._num_lines % LINES_PER_ROUTER_LINE == 0 and (routers := self._routers()):
            self._console.print(f"{self._stage}: {router_line(routers)}", markup=False)
        self._num_lines += 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self._loss = logs["loss"]
            self._figures = short_figures(logs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the terminal as it was, the last picture standing; also after an error."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    @property
    def _rate(self) -> float:
        """Steps per second since this start."""
        return (self._step - self._first_step) / max(time.monotonic() - self._start, 1e-9)

    @property
    def _seconds_left(self) -> float:
        return (self._total - self._step) / max(self._rate, 1e-9)

    def _notes(self) -> list[str]:
        rate = f"{self._rate:.1f} steps/s" if self._rate >= 1 else f"{1 / max(self._rate, 1e-9):.1f} s/step"
        # The first step ends before its loss is logged.
        loss = [] if self._loss is None else [f"loss {self._loss:.3f}"]
        return [*loss, *([rate] if self._step > self._first_step else []), *self._figures]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        left = _clock(self._seconds_left) if self._step > self._first_step else "-:--"
        notes = Text("  ".join(self._notes()), no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(total=max(1, self._total), completed=self._step)
        line = Table.grid(padding=(0, 2), expand=True)
        head: list[Any] = [Text(self._stage, style="bold"), bar, f"{self._step}/{self._total}"]
        for index in range(len(head)):
            line.add_column(ratio=1 if index == 1 else None, no_wrap=True)
        tail = [notes] if width >= ONE_LINE else []
        for _ in (*tail, left):
            line.add_column(no_wrap=True)
        line.add_row(*head, *tail, Text(left, style="cyan"))
        shown: list[Any] = [line] if tail else [line, notes]
        if self._show_panel and (routers := self._routers()):
            shown.append(router_panel(routers, width))
        yield Group(*shown)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} left" if hours else f"{minutes}:{rest:02} left"
