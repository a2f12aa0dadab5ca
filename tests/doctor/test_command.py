"""The command around the checks: its table, its summary, its exit code."""

from __future__ import annotations

import json
import os
from functools import partial

import pytest

from symphony_vlm import cli
from symphony_vlm.doctor.finding import Check, Outcome

GOOD = Check(name="paper", group="Material", run=partial(Outcome, status="ok", detail="A4"), required=True)
MISSING = Check(
    name="stapler",
    group="Tools",
    run=partial(Outcome, status="absent", detail="for [many] sheets", remedy="pip install 'stapler[red]'"),
)
CRASHES = Check(name="press", group="Tools", run=os.abort, required=True)  # type: ignore[arg-type]


def _doctor(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, checks: list[Check], *arguments: str
) -> tuple[int, str]:
    monkeypatch.setattr("symphony_vlm.doctor.libraries.library_checks", lambda: checks)
    monkeypatch.setattr("symphony_vlm.doctor.devices.device_checks", lambda *, compile_: [])
    monkeypatch.setattr("symphony_vlm.doctor.surroundings.surrounding_checks", list)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", *arguments])
    return int(stop.value.code or 0), capsys.readouterr().out


def test_what_is_missing_and_optional_is_shown_and_no_fault(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out = _doctor(capsys, monkeypatch, [GOOD, MISSING])
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.strip()]
    assert rows[:5] == [
        ["Material"],
        ["paper", "ok", "A4"],
        ["Tools"],
        ["stapler", "absent", "for", "[many]", "sheets"],
        ["pip", "install", "'stapler[red]'"],
    ]
    assert out.endswith("1 ok, 1 absent. Everything that is needed works.\n")


def test_what_is_needed_and_broken_exits_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out = _doctor(capsys, monkeypatch, [GOOD, CRASHES])
    assert code == 1
    assert "Needed and not working: press." in out


def test_the_summary_has_every_check_on_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out = _doctor(capsys, monkeypatch, [GOOD, MISSING, CRASHES], "--json")
    assert code == 1
    (line,) = out.splitlines()
    summary = json.loads(line)
    assert summary["ok"] is False
    assert [(check["name"], check["status"], check["required"]) for check in summary["checks"]] == [
        ("paper", "ok", True),
        ("stapler", "absent", False),
        ("press", "broken", True),
    ]
    assert summary["checks"][1]["remedy"] == "pip install 'stapler[red]'"
