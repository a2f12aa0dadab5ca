"""Progress of the check: a bar on a terminal, a plain line every few seconds otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["show_progress"]

_SECONDS_BETWEEN_LINES = 15.0
_SECONDS_BETWEEN_UPDATES = 0.1


@contextmanager
def show_progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Gives a function to call with the records done and the number of all."""
    columns = ("[bold]checking", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    started = time.monotonic()
    last = started
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("checking", total=None, rate="")

        def advance(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            pause = _SECONDS_BETWEEN_UPDATES if console.is_terminal else _SECONDS_BETWEEN_LINES
            if now - last < pause and done < total:
                return
            rate = done / max(now - started, 1e-9)
            if console.is_terminal:
                bar.update(task, completed=done, total=total, rate=f"{rate:,.0f} records/s")
            elif now - last >= pause:
                left = (total - done) / max(rate, 1e-9)
                console.print(f"checked {done:,} of {total:,} records, {rate:,.0f} a second, {left:.0f} s left")
            last = now

        yield advance
