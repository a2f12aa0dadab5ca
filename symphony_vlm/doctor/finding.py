"""What a check is, and what it has found. Imports nothing heavy, as the process that prints stays light."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Check", "Finding", "Outcome", "Status"]

Status = Literal["ok", "absent", "warning", "broken"]
"""``absent``: an optional part that is not installed. ``warning``: something works with a limit worth knowing."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a check returns."""

    status: Status
    detail: str
    """A version, a number, a reason: what was found."""
    remedy: str = ""
    """What to do about it; empty where nothing need be done."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Something to try. It is run in another process, so that even a crash of the interpreter becomes a finding.

    `run` must be picklable: a function of a module, or a partial of one.
    """

    name: str
    group: str
    run: Callable[[], Outcome]
    required: bool = False
    """Whether the package is of no use without it."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A check with its outcome."""

    name: str
    group: str
    required: bool
    outcome: Outcome

    @property
    def fails(self) -> bool:
        """Whether the installation cannot be used as it is."""
        return self.required and self.outcome.status in ("absent", "broken")

    def to_dict(self) -> dict[str, Any]:
        """An entry of ``checks`` in the summary of ``--json``."""
        return {
            "name": self.name,
            "group": self.group,
            "status": self.outcome.status,
            "required": self.required,
            "detail": self.outcome.detail,
            "remedy": self.outcome.remedy,
        }
