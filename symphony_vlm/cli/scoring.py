"""Commands that score existing answers: no model, no images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

from symphony_vlm.cli.application import Json, app, console, finish
from symphony_vlm.errors import InputError
from symphony_vlm.files import write_json

if TYPE_CHECKING:
    from symphony_vlm.evaluation.golden import Check
    from symphony_vlm.evaluation.scoring import Score

__all__: list[str] = []

SHARED_DATA = "SYMPHONY_VLM_SHARED_DATA"


@app.command()
def score(
    task: Annotated[str, typer.Option(help="Name of a benchmark, or a Python file that defines TASK.")],
    predictions: Annotated[Path, typer.Option(help="The benchmark's result format, or LLaVA's answer lines.")],
    annotations: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Official file or folder; not needed where predictions hold the truth."),
    ] = None,
    questions: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="LLaVA's question file, where answers alone do not name the item (POPE)."),
    ] = None,
    on_unparsed: Annotated[str, typer.Option(help="wrong, or random:SEED (MMMU's script has random:42).")] = "wrong",
    export: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write what a server or a judge takes to this JSON file (VQAv2, VizWiz, MM-Vet ...)."),
    ] = None,
    json_: Json = False,
) -> None:
    """Score an existing prediction file by the official rule, without a model.

    Example: symphony-vlm score --task mme --predictions results/LaVIN
    """
    from symphony_vlm.evaluation.scoring import parse_on_unparsed, score_files
    from symphony_vlm.evaluation.task import get_task

    found = score_files(
        get_task(task),
        predictions,
        annotations=annotations,
        questions=questions,
        on_unparsed=parse_on_unparsed(on_unparsed),
    )
    if export is not None:
        write_json(export, found.export())
    for warning in found.warnings:
        console().print(f"warning: {warning}")
    if not json_:
        _wide().print(_table(found))
    finish(found.to_dict(), json_, _summary(found))


def _wide() -> Console:
    """Standard output; where it is no terminal, wide enough for every row to stay on its line."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=140)


def _table(found: Score) -> Table:
    table = Table(title=f"{found.task.name} ({found.task.split})")
    for name in ("metric", "value", "of", "items"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for metric in found.metrics:
        value = found.values[metric.name]
        shown = "-" if value is None else f"{value:.4f}"
        table.add_row(metric.name, shown, f"{metric.scale:g}", str(len(metric.members(found.outcomes))))
    return table


def _summary(found: Score) -> str:
    files = "".join(f"\nsha256 of the {role}: {digest}" for role, digest in found.sha256.items())
    return f"{len(found.outcomes)} items, {found.n_unparsed} unparsed, {len(found.missing)} missing{files}"


@app.command("verify-scorers")
def verify_scorers(
    golden: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help=f"Folder of published outputs; default: golden in the folder that {SHARED_DATA} names."),
    ] = None,
    json_: Json = False,
) -> None:
    """Recompute the known scores of published outputs; exit code 1 if one differs.

    Example: symphony-vlm verify-scorers --golden data/golden
    """
    from symphony_vlm.evaluation.golden import verify_scorers as verify

    if golden is None:
        shared = os.environ.get(SHARED_DATA)
        if not shared:
            raise InputError(
                "no golden files were named",
                where="verify-scorers",
                remedy=f"Add --golden DIR, or set {SHARED_DATA} to the folder above it.",
            )
        golden = Path(shared) / "golden"
    checks = verify(golden)
    wrong = [check for check in checks if not check.good]
    if not json_:
        _wide().print(_checks_table(checks))
    summary = {
        "n_checks": len(checks),
        "n_differences": len(wrong),
        "checks": [
            {
                "source": check.source,
                "figure": check.figure,
                "expected": check.expected,
                "got": check.got,
                "difference": check.difference,
                "tolerance": check.tolerance,
                "good": check.good,
            }
            for check in checks
        ],
    }
    finish(summary, json_, f"{len(checks) - len(wrong)} of {len(checks)} figures as expected")
    if wrong:
        raise typer.Exit(1)


def _checks_table(checks: list[Check]) -> Table:
    table = Table()
    for name in ("source", "figure", "expected", "got", "difference", ""):
        table.add_column(name, justify="left" if name in ("source", "figure", "") else "right")
    for check in checks:
        row = (f"{value:.10g}" for value in (check.expected, check.got))
        table.add_row(check.source, check.figure, *row, f"{check.difference:.1e}", "ok" if check.good else "DIFFERS")
    return table
