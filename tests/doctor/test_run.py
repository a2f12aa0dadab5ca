"""Checks run in another process, and whatever happens there becomes a finding."""

from __future__ import annotations

import os
import time
from functools import partial

from symphony_vlm.doctor.finding import Check, Finding, Outcome
from symphony_vlm.doctor.run import examine

# Functions that a new process can import by name: those of the standard library and of the package.
WORKS = partial(Outcome, status="ok", detail="here")


def test_a_crash_a_hang_and_an_exception_are_findings_and_the_rest_goes_on() -> None:
    checks = [
        Check(name="first", group="g", run=WORKS),
        Check(name="crashes", group="g", run=os.abort, required=True),  # type: ignore[arg-type]
        Check(name="leaves", group="g", run=partial(os._exit, 3)),
        Check(name="raises", group="g", run=partial(int, "no number")),  # type: ignore[arg-type]
        Check(name="last", group="g", run=WORKS),
    ]
    findings = {finding.name: finding for finding in examine(checks)}
    assert list(findings) == [check.name for check in checks]
    details = {name: (finding.outcome.status, finding.outcome.detail) for name, finding in findings.items()}
    assert details["first"] == details["last"] == ("ok", "here")
    assert details["crashes"] == ("broken", "ended the process (SIGABRT)")
    assert details["leaves"] == ("broken", "ended the process (exit code 3)")
    assert details["raises"] == ("broken", "ValueError: invalid literal for int() with base 10: 'no number'")
    assert [name for name, finding in findings.items() if finding.fails] == ["crashes"]


def test_a_check_without_an_answer_is_given_up() -> None:
    start = time.monotonic()
    hangs = Check(name="hangs", group="g", run=partial(time.sleep, 600))  # type: ignore[arg-type]
    (finding,) = examine([hangs], seconds=2)
    assert (finding.outcome.status, finding.outcome.detail) == ("broken", "no answer within 2 s")
    assert time.monotonic() - start < 60


def test_only_what_is_required_and_missing_or_broken_fails() -> None:
    def fails(status: str, required: bool) -> bool:
        outcome = Outcome(status=status, detail="")  # type: ignore[arg-type]
        return Finding(name="n", group="g", required=required, outcome=outcome).fails

    assert [fails(status, True) for status in ("ok", "warning", "absent", "broken")] == [False, False, True, True]
    assert not any(fails(status, False) for status in ("ok", "warning", "absent", "broken"))
