"""Commands that measure models: evaluation, report, inspection."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console

from symphony_vlm.cli.application import Json, app, console, finish, names
from symphony_vlm.cli.memory import keep_freed_memory
from symphony_vlm.errors import InputError

if TYPE_CHECKING:
    from symphony_vlm.evaluation.plan import EvaluationPlan, Scoring
    from symphony_vlm.evaluation.quantities import Resampling

__all__: list[str] = []

Interval = Annotated[str, typer.Option(help="Of the bootstrap: percentile, or bca (bias-corrected and accelerated).")]
MovedData = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Where the benchmark's data is now, to show pictures; default: where eval found it."),
]
MovedImages = Annotated[Optional[Path], typer.Option(help="Base of the records' image paths now.")]  # noqa: UP045


@app.command("eval")
def evaluate(
    model: Annotated[
        list[str],
        typer.Option(help="Folder of a model or of a finished run, or a hub name; repeat it to share the pictures."),
    ],
    output: Annotated[Path, typer.Option(help="Folder for results and predictions; of several models, for theirs.")],
    task: Annotated[
        str | None,
        typer.Option(help="Names of tasks or Python files that define TASK; default short_answer if --data is given."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="The benchmark's official file or folder, or its name on the hub.")
    ] = None,
    image_folder: Annotated[Optional[Path], typer.Option(help="Base of the records' image paths.")] = None,  # noqa: UP045
    corruption: Annotated[str, typer.Option(help="Names separated by commas, common (15), all (19) or none.")] = "none",
    severity: Annotated[str, typer.Option(help="1 to 5, separated by commas.")] = "1,2,3,4,5",
    corrupt_at: Annotated[
        str, typer.Option(help="native, long_side:N (every picture resized to that first) or model_input.")
    ] = "native",
    attack: Annotated[
        str,
        typer.Option(help="Names with budgets, e.g. word_swap:0.1,typographic,option_permutation,pgd:4/255:10."),
    ] = "none",
    limit: Annotated[
        int | None, typer.Option(help="About so many questions per cell, of whole pictures.", min=1)
    ] = None,
    corrupted_limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="The same for corrupted cells; default: as many.", min=1),
    ] = None,
    budget: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="Minutes for everything; chooses --limit by a short measurement.", metavar="MINUTES", min=0.0
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the subset and the corruptions.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Questions answered together.", min=1)] = 64,
    max_new_tokens: Annotated[Optional[int], typer.Option(help="Longest answer; default: the task's.", min=1)] = None,  # noqa: UP045
    scoring: Annotated[
        str, typer.Option(help="generate, or likelihood: the likeliest option of a multiple choice is the answer.")
    ] = "generate",
    max_errors: Annotated[
        float, typer.Option(help="Share of a cell's items that may fail before it has no score.", min=0.0, max=1.0)
    ] = 0.01,
    check_batch: Annotated[
        int,
        typer.Option(help="Answer so many questions of each task also alone, to see whether batches matter.", min=0),
    ] = 0,
    routing: Annotated[
        bool, typer.Option("--routing", help="Record the routers and compare corrupted with clean (same answers).")
    ] = False,
    json_: Json = False,
) -> None:
    """Evaluate models, clean, on corrupted pictures and under attack; run the same command again to continue.

    Example: symphony-vlm eval --model runs/quickstart/smoe/model --task scenes --corruption fog --output out
    """
    from symphony_vlm.corruptions import parse_corrupt_at, parse_corruptions

    tasks = names(task) if task else (["short_answer"] if data else [])
    if not tasks:
        raise InputError("neither a task nor data was given", where="eval", remedy="Add --task scenes or --data FILE.")
    for name, value in (("--limit", limit), ("--corrupted-limit", corrupted_limit)):
        if budget is not None and value is not None:
            raise InputError("the budget chooses the limit", where=name, remedy=f"Leave out {name} or --budget.")
    corruptions = parse_corruptions(corruption)
    severities = _severities(severity)
    from symphony_vlm.evaluation.attacks.catalogue import parse_attacks
    from symphony_vlm.evaluation.report import write_report
    from symphony_vlm.evaluation.runner import EvaluationPlan
    from symphony_vlm.evaluation.runner import evaluate as run

    plan = EvaluationPlan(
        model=model[0],
        tasks=tuple(tasks),
        data=data,
        image_folder=image_folder,
        corruptions=tuple(corruptions),
        severities=severities,
        corrupt_at=parse_corrupt_at(corrupt_at),
        attacks=parse_attacks(attack),
        limit=limit,
        corrupted_limit=corrupted_limit,
        budget_minutes=budget,
        seed=seed,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        scoring=_scoring(scoring),
        max_errors=max_errors,
        check_batch=check_batch,
        routing=routing,
    )
    keep_freed_memory()
    if len(model) > 1:
        _evaluate_several(plan, model, output, json_)
        return
    summary = run(plan, output, console=console())
    if not summary.first_process:
        raise typer.Exit(3 if summary.num_errors else 0)
    report = write_report([output], output)
    lines = [f"{cell}: {'no score' if v is None else f'{v:.4f}'}" for cell, v in summary.headline.items()]
    finish(summary.to_dict(), json_, "\n".join([*lines, f"results: {summary.results}", f"report: {report}"]))
    if summary.num_errors:
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(summary.errors.items()))
        console().print(f"{summary.num_errors} items failed ({kinds}); their records name the reason")
        raise typer.Exit(3)


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="Folders written by eval; the first is the baseline.")],
    output: Annotated[Path, typer.Option(help="Folder for report.html and the tables.")],
    interval: Interval = "percentile",
    data: MovedData = None,
    image_folder: MovedImages = None,
    json_: Json = False,
) -> None:
    """Put evaluations of several models into one page and tables.

    Example: symphony-vlm report out/smoe out/symphony_smoe --output out/report
    """
    from symphony_vlm.evaluation.item_finder import ItemFinder
    from symphony_vlm.evaluation.report import write_report

    finder = ItemFinder(data=data, image_folder=image_folder)
    page = write_report(results, output, resampling=_resampling(interval), finder=finder)
    finish({"report": str(page), "results": str(output / "results.json")}, json_, str(page))


@app.command()
def compare(
    result_a: Annotated[Path, typer.Argument(help="Folder written by eval: A, the baseline.")],
    result_b: Annotated[Path, typer.Argument(help="Folder written by eval: B, asked the same questions.")],
    output: Annotated[Path, typer.Option(help="Folder for comparison.json, comparison.html and the tables.")],
    interval: Interval = "percentile",
    data: MovedData = None,
    image_folder: MovedImages = None,
    json_: Json = False,
) -> None:
    """Compare two models item by item: is B better than A, and does it lose less under corruption?

    Example: symphony-vlm compare out/smoe out/symphony_smoe --output out/comparison
    """
    from symphony_vlm.evaluation.compare_report import write_comparison
    from symphony_vlm.evaluation.item_finder import ItemFinder

    finder = ItemFinder(data=data, image_folder=image_folder)
    written = write_comparison(result_a, result_b, output, resampling=_resampling(interval), finder=finder)
    summary = {
        "comparison": str(written.json),
        "html": str(written.html),
        "verdicts": list(written.verdicts),
        "primary": dict(written.primary),
    }
    finish(summary, json_, "\n".join([*written.verdicts, str(written.html)]))


@app.command("inspect")
def inspect_routers(
    model: Annotated[str, typer.Option(help="Folder of a model or of a finished run, or a hub name.")],
    output: Annotated[Optional[Path], typer.Option(help="Folder for inspect.json and figures (PNG).")] = None,  # noqa: UP045
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Conversations to measure load and entropy on; default: the training log's."),
    ] = None,
    image_folder: Annotated[Optional[Path], typer.Option(help="Base of the records' image paths.")] = None,  # noqa: UP045
    limit: Annotated[Optional[int], typer.Option(help="Records to run; default 256.", min=1)] = None,  # noqa: UP045
    json_: Json = False,
) -> None:
    """Show what the routers of a model do: load, entropy and the expert graph of every sparse layer.

    Example: symphony-vlm inspect --model runs/quickstart/symphony_smoe/model --output out
    """
    from symphony_vlm.evaluation.inspection import inspect_model, summary, table, write_inspection

    found = inspect_model(model, data=data, image_folder=image_folder, limit=limit, console=console())
    paths = write_inspection(found, output) if output else []
    if not json_:
        wide = Console(highlight=False)
        wide.print(table(found), width=None if wide.is_terminal else 120)
    finish(summary(found, paths), json_, "\n".join(map(str, paths)) or "add --output DIR for figures and inspect.json")


def _evaluate_several(plan: EvaluationPlan, models: list[str], output: Path, json_: bool) -> None:
    from symphony_vlm.evaluation.report import write_report
    from symphony_vlm.evaluation.sweep import evaluate_models

    summary = evaluate_models(plan, models, output, console=console())
    if summary.summaries[0].first_process:
        report = write_report(summary.folders, output)
        lines = [
            f"{label}: {cell}: {'no score' if value is None else f'{value:.4f}'}"
            for label, figures in summary.headline.items()
            for cell, value in figures.items()
        ]
        results = output / "results.json"
        finish(summary.to_dict(results), json_, "\n".join([*lines, f"results: {results}", f"report: {report}"]))
        if summary.num_errors:
            kinds = ", ".join(f"{count} {name}" for name, count in sorted(summary.errors.items()))
            console().print(f"{summary.num_errors} items failed ({kinds}); their records name the reason")
    if summary.num_errors:
        raise typer.Exit(3)


def _resampling(interval: str) -> Resampling:
    from symphony_vlm.evaluation.quantities import INTERVAL_KINDS, Resampling

    if interval not in INTERVAL_KINDS:
        raise InputError(f"{interval!r} is none of {', '.join(INTERVAL_KINDS)}", where="--interval")
    return Resampling(interval=INTERVAL_KINDS[INTERVAL_KINDS.index(interval)])


def _severities(text: str) -> tuple[int, ...]:
    values = names(text)
    if not values or any(value not in ("1", "2", "3", "4", "5") for value in values):
        raise InputError(f"{text!r} must be numbers from 1 to 5 separated by commas", where="--severity")
    return tuple(sorted({int(value) for value in values}))


def _scoring(text: str) -> Scoring:
    from symphony_vlm.evaluation.plan import SCORINGS

    if text not in SCORINGS:
        raise InputError(f"{text!r} is none of {', '.join(SCORINGS)}", where="--scoring")
    return SCORINGS[SCORINGS.index(text)]
