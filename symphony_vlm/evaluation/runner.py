"""Evaluates a model on tasks, clean and corrupted. Running it again continues, in any number of processes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from symphony_vlm.corruptions import canary, find_frost_textures
from symphony_vlm.evaluation.baselines import constant_baselines
from symphony_vlm.evaluation.batch_check import check_batches
from symphony_vlm.evaluation.cell import run_cell
from symphony_vlm.evaluation.cell_results import cell_results
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.opening import OpenedModel, open_model
from symphony_vlm.evaluation.plan import EvaluationPlan, check_manifest, record_batch_check
from symphony_vlm.evaluation.predictor import AnswersItems
from symphony_vlm.evaluation.processes import Processes, join
from symphony_vlm.evaluation.records import merge_records
from symphony_vlm.evaluation.routing.run import RoutingRun
from symphony_vlm.evaluation.task import EvaluationItem, Task, get_task
from symphony_vlm.files import write_json
from symphony_vlm.model.loading import resolve_model_folder
from symphony_vlm.training.provenance import provenance

__all__ = ["EvaluationPlan", "EvaluationSummary", "evaluate"]

Items = dict[str, list[EvaluationItem]]


@dataclass(frozen=True, kw_only=True)
class EvaluationSummary:
    """Where the results are and the headline figures."""

    results: Path
    headline: dict[str, float | None]
    num_errors: int
    errors: dict[str, int]
    """Items that failed, by the exception's name; empty in processes other than the first."""
    first_process: bool
    """Whether this process has written the results; the others have only read them."""

    def to_dict(self) -> dict[str, Any]:
        """The summary of ``--json``."""
        return {"results": str(self.results), "headline": self.headline, "n_errors": self.num_errors}


@dataclass
class _Progress:
    """Counts items over all cells."""

    bar: Progress
    task: Any
    done: int = field(default=0)

    def __call__(self, items: int) -> None:
        self.done += items
        self.bar.update(self.task, completed=self.done)


def evaluate(plan: EvaluationPlan, output: Path, *, console: Console | None = None) -> EvaluationSummary:
    """Runs every cell, then writes ``results.json``.

    Args:
        plan: what to do.
        output: folder for ``manifest.json``, ``results.json`` and ``predictions/``.
        console: where progress goes; default: standard error.

    Raises:
        InputError: the model, a task's data or a setting cannot be used, or the folder holds another evaluation.
    """
    console = console or Console(stderr=True)
    processes = join()
    tasks = [get_task(name) for name in plan.tasks]
    if "frost" in plan.corruptions:
        find_frost_textures()
    start = time.monotonic()
    # The cheap checks first: loading a large model takes minutes.
    resolve_model_folder(plan.model)
    cells = [cell for task in tasks for cell in _cells(task, plan)]
    with processes.first_before_others():
        items = {task.name: list(task.load(plan.data, plan.image_folder, output / "data", plan.seed)) for task in tasks}
    model = open_model(plan.model, device=_device(processes))
    routing = RoutingRun.of(plan, model, output, processes.rank, console)
    manifest: dict[str, Any] = {}
    with processes.first_before_others():
        if processes.first:
            manifest = check_manifest(plan, output, items)
            for cell in cells:  # what an earlier start has left, of however many processes
                merge_records(output / "predictions" / cell.file_name)
            if routing is not None:
                routing.forget_unrouted(cells)
    rows, errors = _run_cells(plan, output, cells, items, model, processes, console, routing)
    if processes.first:
        surroundings = _surroundings(plan, manifest, model, processes, time.monotonic() - start)
        baselines = [b for task in tasks for b in constant_baselines(task.name, items[task.name], seed=plan.seed)]
        document = {"results": rows, "baselines": baselines, "provenance": surroundings}
        if plan.check_batch:
            document["batch_check"] = _check_batches(plan, output, cells, items, model, console)
        if routing is not None:
            document["robustness"] = routing.results(cells, items, plan.model, seed=plan.seed)
        write_json(output / "results.json", document)
        record = Path(resolve_model_folder(plan.model)) / "training.json"
        if record.is_file():
            shutil.copyfile(record, output / "training.json")
    processes.barrier()
    return _summary(output / "results.json", errors, processes)


def _run_cells(
    plan: EvaluationPlan,
    output: Path,
    cells: Sequence[Cell],
    items: Items,
    model: OpenedModel,
    processes: Processes,
    console: Console,
    routing: RoutingRun | None,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows of results, none in processes other than the first, and how many items failed of what."""
    start = time.monotonic()
    router = model.router
    chosen = {cell.file_name: _choose(items[cell.task.name], plan, cell) for cell in cells}
    total = sum(processes.owns(item) for listed in chosen.values() for item in listed)
    rows: list[dict[str, Any]] = []
    errors: Counter[str] = Counter()
    name = f"evaluating {router}" + (f" (process 1 of {processes.size})" if processes.size > 1 else "")
    columns = ("[bold]{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("questions"))
    silent = not console.is_terminal or not processes.first
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=silent) as bar:
        advance = _Progress(bar, bar.add_task(name, total=total))
        for cell in cells:
            predictor = _predictor(
                model if routing is None else routing.of_cell(cell), cell.task, plan, plan.batch_size
            )
            records = run_cell(
                cell,
                chosen[cell.file_name],
                predictor,
                output / "predictions" / cell.file_name,
                advance,
                batch_size=plan.batch_size,
                processes=processes,
            )
            if not processes.first:
                continue
            if routing is not None:
                routing.finish(cell, [item.id for item in chosen[cell.file_name]])
            of_cell = cell_results(plan, cell, router, chosen[cell.file_name], records)
            rows += of_cell
            errors.update(record["error"]["type"] for record in records if record["error"])
            if not console.is_terminal:
                _print_cell(console, of_cell[0], cell, advance.done, total, time.monotonic() - start)
    return rows, errors


def _check_batches(
    plan: EvaluationPlan,
    output: Path,
    cells: Sequence[Cell],
    items: Items,
    model: OpenedModel,
    console: Console,
) -> list[dict[str, Any]]:
    """What `check_batches` finds in each task's clean cell; said on the console and noted in the manifest."""
    found = [
        check_batches(
            cell,
            _choose(items[cell.task.name], plan, cell),
            partial(_predictor, model, cell.task, plan),
            n_items=plan.check_batch,
            batch_size=plan.batch_size,
        )
        for cell in cells
        if cell.severity == 0
    ]
    for one in found:
        console.print(
            f"{one['task']}: of {one['n_items']} questions asked alone and in batches of {one['batch_size']}, "
            f"{len(one['text_differences'])} have another answer and {len(one['score_flips'])} another score"
        )
    record_batch_check(output, all(one["batch_invariant"] for one in found))
    return found


def _predictor(model: OpenedModel, task: Task, plan: EvaluationPlan, batch_size: int) -> AnswersItems:
    longest = plan.max_new_tokens or task.max_new_tokens
    if plan.scoring == "likelihood":
        return model.predictor(batch_size=batch_size, max_new_tokens=longest, options=task.options)
    return model.predictor(batch_size=batch_size, max_new_tokens=longest)


def _cells(task: Task, plan: EvaluationPlan) -> list[Cell]:
    grid = [("none", 0)] + [(name, severity) for name in plan.corruptions for severity in plan.severities]
    return [Cell(task=task, corruption=name, severity=severity, seed=plan.seed) for name, severity in grid]


def _choose(items: Sequence[EvaluationItem], plan: EvaluationPlan, cell: Cell) -> list[EvaluationItem]:
    """Items of whole pictures, in an order that depends on the seed and the pictures' names alone."""
    groups: dict[str, list[EvaluationItem]] = {}
    for item in items:
        groups.setdefault(item.image_key, []).append(item)

    def rank(key: str) -> str:
        # The last part of a path, not all of it: another folder must give the same subset.
        return hashlib.sha256(f"{plan.seed}/{key.rpartition('/')[2]}".encode()).hexdigest()

    limit = plan.limit if cell.severity == 0 or plan.corrupted_limit is None else plan.corrupted_limit
    chosen: list[EvaluationItem] = []
    for key in sorted(groups, key=rank):
        if limit is not None and len(chosen) >= limit:
            break
        chosen += groups[key]
    return chosen


def _device(processes: Processes) -> str | None:
    """A GPU for each process of a launch, where there are GPUs; None: `open_model` chooses."""
    if processes.size == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"


def _surroundings(
    plan: EvaluationPlan,
    manifest: dict[str, Any],
    model: OpenedModel,
    processes: Processes,
    seconds: float,
) -> dict[str, Any]:
    facts = provenance(
        seed=plan.seed,
        config_sha256=hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest(),
        model_sha256=manifest["model_sha256"],
        items_sha256=manifest["items_sha256"],
        corruption_canary=canary(),
        template=model.template,
        dtype=str(model.model.dtype).removeprefix("torch."),
        device=str(model.model.device),
        batch_size=plan.batch_size,
        processes=processes.size,
        wall_seconds=round(seconds, 1),
    )
    commit = (facts["git"] or {}).get("commit")
    version = facts["versions"].get("symphony-vlm", "unknown")
    return facts | {"scorer_version": f"{version}+{commit[:12]}" if commit else version}


def _summary(results: Path, errors: Counter[str], processes: Processes) -> EvaluationSummary:
    """From the file, which every process can read."""
    headlines: dict[str, dict[str, Any]] = {}
    for row in json.loads(results.read_text())["results"]:
        headlines.setdefault(f"{row['task']}/{row['corruption']}/{row['severity']}", row)
    return EvaluationSummary(
        results=results,
        headline={cell: row["value"] for cell, row in headlines.items()},
        num_errors=sum(row["n_errors"] for row in headlines.values()),
        errors=dict(errors),
        first_process=processes.first,
    )


def _print_cell(console: Console, row: dict[str, Any], cell: Cell, done: int, total: int, seconds: float) -> None:
    shown = "no score" if row["value"] is None else f"{row['value']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
    left = (total - done) * seconds / max(done, 1)
    console.print(f"{cell.task.name} {cell.corruption} {cell.severity}: {shown}  ({done}/{total}, {left:.0f} s left)")
