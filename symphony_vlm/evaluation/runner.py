"""Evaluates a model on tasks, clean and corrupted. Running it again continues."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.baselines import constant_baselines
from symphony_vlm.evaluation.cell import Cell, run_cell
from symphony_vlm.evaluation.corruptions import canary, find_frost_textures
from symphony_vlm.evaluation.item import Outcome
from symphony_vlm.evaluation.metrics import Metric, metric_intervals
from symphony_vlm.evaluation.opening import open_model
from symphony_vlm.evaluation.statistics import Interval
from symphony_vlm.evaluation.task import EvaluationItem, Scored, Task, get_task
from symphony_vlm.files import write_json
from symphony_vlm.model.loading import resolve_model_folder
from symphony_vlm.training.provenance import provenance

__all__ = ["EvaluationPlan", "EvaluationSummary", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What to evaluate. Everything here changes answers or items and is part of the manifest."""

    model: str
    tasks: tuple[str, ...]
    data: Path | None = None
    image_folder: Path | None = None
    corruptions: tuple[str, ...] = ()
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    limit: int | None = None
    """At most about so many questions per clean cell, whole pictures of a seeded order."""
    corrupted_limit: int | None = None
    """The same for corrupted cells; default: `limit`. Its pictures are the first of the clean cell's."""
    seed: int = 0
    batch_size: int = 64
    max_new_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationSummary:
    """Where the results are and the headline figures."""

    results: Path
    headline: dict[str, float | None]
    num_errors: int

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
    tasks = [get_task(name) for name in plan.tasks]
    if "frost" in plan.corruptions:
        find_frost_textures()
    start = time.monotonic()
    # The cheap checks first: loading a large model takes minutes.
    resolve_model_folder(plan.model)
    items = {task.name: list(task.load(plan.data, plan.image_folder, output / "data", plan.seed)) for task in tasks}
    model = open_model(plan.model)
    manifest = _check_manifest(plan, output, items)
    router = model.router
    cells = [cell for task in tasks for cell in _cells(task, plan)]
    chosen = {cell.file_name: _choose(items[cell.task.name], plan, cell) for cell in cells}
    results: list[dict[str, Any]] = []
    headlines: list[dict[str, Any]] = []
    columns = ("[bold]{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("questions"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        total = sum(len(chosen[cell.file_name]) for cell in cells)
        advance = _Progress(bar, bar.add_task(f"evaluating {router}", total=total))
        for cell in cells:
            predictor = model.predictor(
                batch_size=plan.batch_size, max_new_tokens=plan.max_new_tokens or cell.task.max_new_tokens
            )
            path = output / "predictions" / cell.file_name
            records = run_cell(cell, chosen[cell.file_name], predictor, path, advance)
            rows = _results(plan, cell, router, chosen[cell.file_name], records)
            headlines.append(rows[0])
            results += rows
            if not console.is_terminal:
                _print_cell(console, rows[0], cell, advance.done, total, time.monotonic() - start)
    summary = {
        "results": results,
        "baselines": [b for task in tasks for b in constant_baselines(task.name, items[task.name], seed=plan.seed)],
        "provenance": provenance(
            seed=plan.seed,
            config_sha256=hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest(),
            model_sha256=manifest["model_sha256"],
            items_sha256=manifest["items_sha256"],
            corruption_canary=canary(),
            wall_seconds=round(time.monotonic() - start, 1),
        ),
    }
    write_json(output / "results.json", summary)
    record = Path(resolve_model_folder(plan.model)) / "training.json"
    if record.is_file():
        shutil.copyfile(record, output / "training.json")
    headline = {f"{r['task']}/{r['corruption']}/{r['severity']}": r["value"] for r in headlines}
    errors = sum(r["n_errors"] for r in headlines)
    return EvaluationSummary(results=output / "results.json", headline=headline, num_errors=errors)


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


def _results(
    plan: EvaluationPlan, cell: Cell, router: str, items: Sequence[EvaluationItem], records: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The task's figures, headline first; those of groups (``accuracy/colour``) for the clean cell only."""
    outcomes = [
        Outcome(item=item, prediction=record["prediction"], scored=cell.task.score(record["prediction"], item))
        for item, record in zip(items, records, strict=True)
        if record["prediction"] is not None
    ]
    # Records of items that failed still count as items, and groups are those of all items.
    everything = [
        Outcome(item=item, prediction=None, scored=Scored(score=0.0, parsed="", status="error")) for item in items
    ]
    metrics = [m for m in cell.task.metrics(outcomes or everything) if cell.severity == 0 or "/" not in m.name]
    intervals = metric_intervals(metrics, outcomes, seed=plan.seed) if outcomes else {}
    by_id = {record["item_id"]: record for record in records}
    return [
        _result(
            plan,
            cell,
            router,
            metric,
            intervals.get(metric.name),
            [by_id[outcome.item.id] for outcome in metric.members(everything)],
        )
        for metric in metrics
    ]


def _result(
    plan: EvaluationPlan,
    cell: Cell,
    router: str,
    metric: Metric,
    interval: Interval | None,
    records: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "model": plan.model,
        "router": router,
        "task": cell.task.name,
        "split": cell.task.split,
        "corruption": cell.corruption,
        "severity": cell.severity,
        "metric": metric.name,
        "value": interval.value if interval else None,
        "higher_is_better": metric.higher_is_better,
        "scale": metric.scale,
        "ci_low": interval.low if interval else None,
        "ci_high": interval.high if interval else None,
        "n_items": len(records),
        "n_images": len({record["image_key"] for record in records}),
        "n_errors": sum(record["error"] is not None for record in records),
        "n_unparsed": sum(record["parse_status"] in ("unparsed", "empty", "ambiguous") for record in records),
    }


def _print_cell(console: Console, last: dict[str, Any], cell: Cell, done: int, total: int, seconds: float) -> None:
    shown = (
        "no score" if last["value"] is None else f"{last['value']:.3f} [{last['ci_low']:.3f}, {last['ci_high']:.3f}]"
    )
    left = (total - done) * seconds / max(done, 1)
    console.print(f"{cell.task.name} {cell.corruption} {cell.severity}: {shown}  ({done}/{total}, {left:.0f} s left)")


def _check_manifest(plan: EvaluationPlan, output: Path, items: dict[str, list[EvaluationItem]]) -> dict[str, Any]:
    """Writes the manifest; a folder with another one is refused, since its predictions would be mixed."""
    digest = hashlib.sha256()
    for name, listed in items.items():
        for item in listed:
            digest.update(json.dumps([name, item.id, item.question, item.answers]).encode())
    manifest = {
        "model": plan.model,
        "model_sha256": _weights_hash(plan.model),
        "task": list(plan.tasks),
        "items_sha256": digest.hexdigest(),
        "n_items": {name: len(listed) for name, listed in items.items()},
        "image_folder": str(plan.image_folder.resolve()) if plan.image_folder else None,
        "limit": plan.limit,
        "corrupted_limit": plan.corrupted_limit,
        "seed": plan.seed,
        "max_new_tokens": plan.max_new_tokens,
        "decoding": "greedy",
        "corrupt_at": "native",
    }
    path = output / "manifest.json"
    if path.is_file():
        found = json.loads(path.read_text())
        changed = [key for key in manifest if found.get(key) != manifest[key]]
        if changed:
            raise InputError(
                f"the folder holds another evaluation; it differs in {', '.join(changed)}",
                where=str(output),
                remedy="Give another --output.",
            )
    write_json(path, manifest)
    return manifest


def _weights_hash(model: str) -> str | None:
    """sha256 over a local model's configuration and weights; None for a hub name."""
    folder = Path(resolve_model_folder(model))
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
