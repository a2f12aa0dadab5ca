"""Runs a study's jobs, several at a time, each in a process of its own; running it again continues."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock

from rich.console import Console

from symphony_vlm.study.jobs import Job

__all__ = ["run_jobs", "visible_gpus"]

LAST_CHARACTERS = 600


def run_jobs(
    jobs: Sequence[Job], *, at_once: int, threads: int, console: Console, gpus: Sequence[str] = ()
) -> dict[str, str]:
    """Runs every job that is not done, in their order as far as what they need is done.

    Args:
        jobs: what to run, with all that they need among them.
        at_once: jobs at a time.
        threads: of each process.
        console: gets a line per job.
        gpus: shared out among the jobs; more jobs at once than GPUs share them.

    Returns:
        By name of each job that failed the end of what it said; those that need it are left, the others ran all the
        same.
    """
    left = [job for job in jobs if not job.is_done()]
    total = len(left)
    console.print(f"{len(jobs)} jobs, {len(jobs) - total} done, {at_once} at a time")
    failures: dict[str, str] = {}
    workers = _Workers(threads, [gpus[index % len(gpus)] for index in range(at_once)] if gpus else [])
    start = time.monotonic()
    pool = ThreadPoolExecutor(max_workers=at_once)
    # Whatever ends this process must end the jobs too: a terminal asks both, a job scheduler this one alone.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    running: dict[Future[str | None], Job] = {}
    try:
        while True:
            unfinished = {job.name for job in (*left, *running.values())} | failures.keys()
            for job in [job for job in left if not any(need.name in unfinished for need in job.needs)]:
                if len(running) < at_once:
                    left.remove(job)
                    running[pool.submit(workers.run, job)] = job
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, problem = running.pop(future), future.result()
                if problem is not None:
                    failures[job.name] = problem
                number = total - len(left) - len(running)
                elapsed = time.monotonic() - start
                rest = elapsed / number * (total - number)
                state = "done" if problem is None else "FAILED"
                console.print(
                    f"{job.name}: {state} ({number} of {total}, {elapsed / 60:.0f} min, about {rest / 60:.0f} left)"
                )
    finally:
        workers.stop()
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, before)
    return failures | {job.name: "waits for jobs that failed" for job in left}


def visible_gpus() -> list[str]:
    """What to put into ``CUDA_VISIBLE_DEVICES`` for each GPU that this process sees."""
    import torch

    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = torch.cuda.device_count()
    return names[:count] if names else [str(index) for index in range(count)]


class _Workers:
    """The processes that run now."""

    def __init__(self, threads: int, gpus: Sequence[str]) -> None:
        # A process with as many threads as cores would fight with the others for them.
        self._environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self._gpus: queue.SimpleQueue[str] = queue.SimpleQueue()
        for gpu in gpus:
            self._gpus.put(gpu)
        self._with_gpus = bool(gpus)
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = Lock()
        self._stopped = False

    def run(self, job: Job) -> str | None:
        """Runs a job to its end; the end of what a failing command said, else None."""
        job.begin()
        start = time.monotonic()
        gpu = self._gpus.get() if self._with_gpus else None
        environment = self._environment | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
        try:
            for command in job.commands.values():
                problem = self._command(command, environment, job.folder / "log.txt")
                if problem is not None:
                    return problem
        finally:
            if gpu is not None:
                self._gpus.put(gpu)
        (job.folder / "seconds.txt").write_text(f"{time.monotonic() - start:.1f}\n", encoding="utf-8")
        job.finish()
        return None

    def stop(self) -> None:
        """Ends what still runs; training saves a checkpoint on its way out."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()

    def _command(self, command: Sequence[str], environment: dict[str, str], log: Path) -> str | None:
        with self._lock:
            if self._stopped:
                return "stopped"
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            self._running.add(process)
        said, _ = process.communicate()
        with self._lock:
            self._running.discard(process)
        with log.open("a", encoding="utf-8") as file:
            file.write(said)
        return None if process.returncode == 0 else said.strip()[-LAST_CHARACTERS:] or f"exit code {process.returncode}"
