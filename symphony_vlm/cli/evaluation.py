"""Commands that measure models: evaluation, report, inspection, corruption of a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console

from symphony_vlm.cli.application import Json, app, console, finish, names
from symphony_vlm.errors import InputError

if TYPE_CHECKING:
    from symphony_vlm.evaluation.plan import Scoring

__all__: list[str] = []


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(help="Folder of a model or of a finished run, or a hub name.")],
    output: Annotated[Path, typer.Option(help="Folder for results and predictions.")],
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
    limit: Annotated[
        int | None, typer.Option(help="About so many questions per cell, of whole pictures.", min=1)
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
    """Evaluate a model, clean and on corrupted pictures; run the same command again to continue.

    Example: symphony-vlm eval --model runs/quickstart/smoe/model --task scenes --corruption fog --output out
    """
    from symphony_vlm.corruptions import parse_corruptions

    tasks = names(task) if task else (["short_answer"] if data else [])
    if not tasks:
        raise InputError("neither a task nor data was given", where="eval", remedy="Add --task scenes or --data FILE.")
    corruptions = parse_corruptions(corruption)
    severities = _severities(severity)
    from symphony_vlm.evaluation.report import write_report
    from symphony_vlm.evaluation.runner import EvaluationPlan
    from symphony_vlm.evaluation.runner import evaluate as run

    plan = EvaluationPlan(
        model=model,
        tasks=tuple(tasks),
        data=data,
        image_folder=image_folder,
        corruptions=tuple(corruptions),
        severities=severities,
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        scoring=_scoring(scoring),
        max_errors=max_errors,
        check_batch=check_batch,
        routing=routing,
    )
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
    json_: Json = False,
) -> None:
    """Put evaluations of several models into one page and tables.

    Example: symphony-vlm report out/smoe out/symphony_smoe --output out/report
    """
    from symphony_vlm.evaluation.report import write_report

    page = write_report(results, output)
    finish({"report": str(page), "results": str(output / "results.json")}, json_, str(page))


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


@app.command()
def corrupt(
    image: Annotated[Path, typer.Argument(help="Picture to corrupt.")],
    corruption: Annotated[str, typer.Option(help="Name, e.g. fog.")],
    severity: Annotated[int, typer.Option(help="1 to 5.")],
    output: Annotated[Path, typer.Option(help="PNG to write.")],
    seed: Annotated[int, typer.Option(help="Equal arguments give equal pixels.")] = 0,
    json_: Json = False,
) -> None:
    """Corrupt one picture.

    Example: symphony-vlm corrupt photo.jpg --corruption fog --severity 3 --output foggy.png
    """
    import numpy as np
    from PIL import Image

    from symphony_vlm.corruptions import corrupt as apply
    from symphony_vlm.corruptions import corruption_rng, image_key
    from symphony_vlm.data.images import image_bytes, load_image
    from symphony_vlm.data.sample import ImageRef

    ref = ImageRef(path=image, name=str(image))
    pixels = np.asarray(load_image(ref))
    rng = corruption_rng(image_key(image_bytes(ref)), corruption, severity, seed)
    Image.fromarray(apply(pixels, corruption, severity, rng)).save(output, format="PNG")
    finish({"output": str(output)}, json_, str(output))


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
