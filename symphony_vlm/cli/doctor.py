"""The command that tries out an installation, and how its findings look."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from symphony_vlm.cli.application import Json, app, console, finish

if TYPE_CHECKING:
    from symphony_vlm.doctor.finding import Finding

__all__: list[str] = []

STYLES = {"ok": "green", "absent": "dim", "warning": "yellow", "broken": "bold red"}


@app.command()
def doctor(
    compile_: Annotated[bool, typer.Option("--compile", help="Try compiled parts too (up to a minute).")] = False,
    json_: Json = False,
) -> None:
    """Try every part of this installation: what works, what does not, what to do. Exit code 1: something needed fails.

    Example: symphony-vlm doctor
    """
    from symphony_vlm import __version__
    from symphony_vlm.doctor.devices import device_checks
    from symphony_vlm.doctor.libraries import library_checks
    from symphony_vlm.doctor.run import examine
    from symphony_vlm.doctor.surroundings import surrounding_checks

    checks = [*library_checks(), *device_checks(compile_=compile_), *surrounding_checks()]
    findings: list[Finding] = []
    with console().status("") as status:
        found = examine(checks)
        for check in checks:
            status.update(f"{check.name} ({len(findings) + 1} of {len(checks)})")
            findings.append(next(found))
    failing = [finding.name for finding in findings if finding.fails]
    if json_:
        summary = {"version": __version__, "ok": not failing, "checks": [finding.to_dict() for finding in findings]}
        finish(summary, True, "")
    else:
        screen = Console(highlight=False)
        if not screen.is_terminal:
            screen = Console(highlight=False, width=120)
        screen.print(_table(findings))
        screen.print(_verdict(__version__, findings, failing))
    if failing:
        raise typer.Exit(1)


def _table(findings: list[Finding]) -> Table:
    """A row a check, a section a group; what to do stands below what was found."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for column in ("name", "status"):
        table.add_column(column, no_wrap=True)
    table.add_column("found", overflow="fold")
    group = None
    for finding in findings:
        if finding.group != group:
            if group is not None:
                table.add_row()
            group = finding.group
            table.add_row(Text(group, style="bold"))
        outcome = finding.outcome
        text = Text(outcome.detail)
        if outcome.remedy:
            text.append(f"\n{outcome.remedy}", style="dim" if outcome.status == "absent" else "italic")
        table.add_row(Text(f"  {finding.name}"), Text(outcome.status, style=STYLES[outcome.status]), text)
    return table


def _verdict(version: str, findings: list[Finding], failing: list[str]) -> Text:
    counts = {status: sum(finding.outcome.status == status for finding in findings) for status in STYLES}
    counts = {f"{status}s" if status == "warning" and n > 1 else status: n for status, n in counts.items()}
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    text = Text(f"\nsymphony_vlm {version}: {told}. ")
    if failing:
        return text.append(f"Needed and not working: {', '.join(failing)}.", style=STYLES["broken"])
    return text.append("Everything that is needed works.", style=STYLES["ok"])
