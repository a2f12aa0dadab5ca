"""Runs a study's cells, several at a time, each in a process of its own; running it again continues."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Lock

from rich.console import Console

from symphony_vlm.study.cells import StudyCell

__all__ = ["run_cells"]

LAST_CHARACTERS = 600


def run_cells(cells: Sequence[StudyCell], *, jobs: int, threads: int, console: Console) -> dict[str, str]:
    """Runs every cell that is not done.

    Args:
        cells: what to run.
        jobs: cells at a time.
        threads: of each process.
        console: gets a line per cell.

    Returns:
        By name of each cell that failed the end of what it said; the others ran all the same.
    """
    waiting = [cell for cell in cells if not cell.is_done()]
    console.print(f"{len(cells)} cells, {len(cells) - len(waiting)} done, {jobs} at a time")
    failures: dict[str, str] = {}
    workers = _Workers(threads)
    start = time.monotonic()
    pool = ThreadPoolExecutor(max_workers=jobs)
    # Whatever ends this process must end the cells too: a terminal asks both, a job scheduler this one alone.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    futures = {pool.submit(workers.run, cell): cell for cell in waiting}
    try:
        for number, future in enumerate(as_completed(futures), start=1):
            cell, problem = futures[future], future.result()
            if problem is not None:
                failures[cell.name] = problem
            elapsed = time.monotonic() - start
            left = elapsed / number * (len(waiting) - number)
            state = "done" if problem is None else "FAILED"
            console.print(
                f"{cell.name}: {state} ({number} of {len(waiting)}, {elapsed / 60:.0f} min, about {left / 60:.0f} left)"
            )
    finally:
        workers.stop()
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, before)
    return failures


class _Workers:
    """The processes that run now."""

    def __init__(self, threads: int) -> None:
        # A process with as many threads as cores would fight with the others for them.
        self._environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = Lock()
        self._stopped = False

    def run(self, cell: StudyCell) -> str | None:
        """Runs a cell to its end; the end of what a failing command said, else None."""
        cell.forget()
        start = time.monotonic()
        for command in (cell.train, cell.measure):
            problem = self._command(command, cell.folder / "log.txt")
            if problem is not None:
                return problem
        (cell.folder / "seconds.txt").write_text(f"{time.monotonic() - start:.1f}\n", encoding="utf-8")
        cell.finish()
        return None

    def stop(self) -> None:
        """Ends what still runs; training saves a checkpoint on its way out."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()

    def _command(self, command: Sequence[str], log: Path) -> str | None:
        with self._lock:
            if self._stopped:
                return "stopped"
            process = subprocess.Popen(
                command, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            self._running.add(process)
        said, _ = process.communicate()
        with self._lock:
            self._running.discard(process)
        with log.open("a", encoding="utf-8") as file:
            file.write(said)
        return None if process.returncode == 0 else said.strip()[-LAST_CHARACTERS:] or f"exit code {process.returncode}"
