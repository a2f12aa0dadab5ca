"""Runs checks one after the other in a process of their own, and survives what they do to it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

from symphony_vlm.doctor.finding import Check, Finding, Outcome

__all__ = ["examine"]

SECONDS = 120.0
"""For one check: the first import of a large library from a slow disk can take a minute."""


def examine(checks: Sequence[Check], *, seconds: float = SECONDS) -> Iterator[Finding]:
    """Runs the checks in order and yields what each has found as soon as it is known.

    One process runs them all, so that a library is imported once. If it crashes or hangs, that is what the check under
    way has found, and another process goes on with the next.

    Args:
        checks: what to try.
        seconds: how long one check may take.
    """
    waiting = list(checks)
    while waiting:
        yield from _run(waiting, seconds)


def _run(waiting: list[Check], seconds: float) -> Iterator[Finding]:
    """One process's findings; takes the checks that have one off the list."""
    context = multiprocessing.get_context("spawn")  # a fork would share the parent's threads and what it imported
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(tuple(waiting), theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        while waiting:
            check = waiting[0]
            lost = None
            try:
                if ours.poll(seconds):
                    outcome = ours.recv()
                else:
                    lost = f"no answer within {seconds:g} s"
            except EOFError:
                process.join()
                lost = _ending(process.exitcode)
            if lost is not None:
                outcome = Outcome(status="broken", detail=lost, remedy="Reinstall it; see docs/troubleshooting.md.")
            waiting.pop(0)
            yield Finding(name=check.name, group=check.group, required=check.required, outcome=outcome)
            if lost is not None:
                return
    finally:
        if waiting or process.is_alive():
            process.kill()
        process.join()
        ours.close()


def _serve(checks: Sequence[Check], results: Connection) -> None:
    """The other process."""
    # Libraries write banners when they are imported. Below Python, as compiled ones do too.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    for check in checks:
        try:
            outcome = check.run()
        except Exception as error:  # whatever it is, it is the finding
            lines = str(error).strip().splitlines() or [""]
            detail = f"{type(error).__name__}: {lines[0][:200]}".rstrip(": ")
            outcome = Outcome(status="broken", detail=detail, remedy="Reinstall it; see docs/troubleshooting.md.")
        results.send(outcome)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"ended the process ({signal.Signals(-code).name})"
    return f"ended the process (exit code {code})"
