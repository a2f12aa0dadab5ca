"""The exception for bad input from a person (files, records, settings, command lines), and two ways a run can end."""

from __future__ import annotations

from typing import Any

__all__ = ["InputError", "SavingError", "Stopped"]


class InputError(ValueError):
    """Something a user gave us cannot be used; the message says what, where and what to do.

    The command line turns it into one line on standard error and exit code 2. Every other exception is a fault of
    ours (or of the machine) and keeps its traceback.

    Args:
        problem: What is wrong, with the offending value and what was expected instead.
        where: The file, record, field or option at fault, e.g. ``"train.json: record 12 (id 'a7')"``.
        remedy: What the user can do about it.
        kind: A short stable name for programs, e.g. ``empty_answer``, where faults of data are counted by kind.
    """

    record_id: str | None = None
    """The id of the record at fault, once whoever read the record has filled it in."""

    def __init__(
        self, problem: str, *, where: str | None = None, remedy: str | None = None, kind: str | None = None
    ) -> None:
        self.problem = problem
        self.where = where
        self.remedy = remedy
        self.kind = kind
        text = f"{where}: {problem}" if where else problem
        sentence = text if text.endswith("?") else f"{text.rstrip('.')}."
        super().__init__(f"{sentence} {remedy}" if remedy else text)

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are pickled by their text alone; this one crosses from worker processes with its parts.
        return _rebuild, (self.problem, self.where, self.remedy, self.kind), {"record_id": self.record_id}


def _rebuild(problem: str, where: str | None, remedy: str | None, kind: str | None) -> InputError:
    return InputError(problem, where=where, remedy=remedy, kind=kind)


class SavingError(OSError):
    """A result could not be written, e.g. because the disk is full; the message says what to do. Exit code 1."""


class Stopped(Exception):
    """A run was asked to stop and has saved where it is.

    Args:
        message: what was saved and how to go on.
        signal_number: of the signal that asked; the exit code is 128 more, as shells have it.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
