"""Evaluates a model on tasks, clean and corrupted. Running it again continues, in any number of processes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from symphony_vlm.corruptions import canary, find_frost_textures, parse_corrupt_at
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.attacks.prepared import PreparedAttacks, attack_summary, require_gradients
from symphony_vlm.evaluation.baselines import constant_baselines
from symphony_vlm.evaluation.batch_check import check_batches
from symphony_vlm.evaluation.budget import half_widths, recorded_budget, settle_limit
from symphony_vlm.evaluation.cell import Respondent, run_cell_together
from symphony_vlm.evaluation.cell_results import cell_results
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.opening import OpenedModel, check_corrupt_at, open_model
from symphony_vlm.evaluation.plan import EvaluationPlan, check_manifest, record_batch_check
from symphony_vlm.evaluation.predictor import AnswersItems
from symphony_vlm.evaluation.processes import Processes, join
from symphony_vlm.evaluation.progress import EvaluationProgress
from symphony_vlm.evaluation.records import merge_records
from symphony_vlm.evaluation.routing.run import RoutingRun
from symphony_vlm.evaluation.sharing import SharedEncoder, share_encoders
from symphony_vlm.evaluation.subset import first_pictures
from symphony_vlm.evaluation.task import EvaluationItem, Task, get_task
from symphony_vlm.files import write_json
from symphony_vlm.model.loading import resolve_model_folder
from symphony_vlm.training.provenance import provenance

__all__ = ["EvaluationPlan", "EvaluationSummary", "evaluate", "evaluate_together"]

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


@dataclass(kw_only=True)
class _Evaluation:
    """One model's part: its plan and folder, and what has been found."""

    plan: EvaluationPlan
    output: Path
    model: OpenedModel
    label: str
    encoder: SharedEncoder | None
    routing: RoutingRun | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def model_for(self, cell: Cell) -> OpenedModel:
        """The model, which takes down the cell's routing if that was asked for."""
        return self.model if self.routing is None else self.routing.of_cell(cell)


def evaluate(
    plan: EvaluationPlan, output: Path, *, console: Console | None = None, processes: Processes | None = None
) -> EvaluationSummary:
    """Runs every cell, then writes ``results.json``.

    Args:
        plan: what to do.
        output: folder for ``manifest.json``, ``results.json`` and ``predictions/``.
        console: where progress goes; default: standard error.
        processes: who takes part; default: the processes of the launch.

    Raises:
        InputError: the model, a task's data or a setting cannot be used, or the folder holds another evaluation.
    """
    (summary,) = evaluate_together([plan], [output], scratch=output, console=console, processes=processes)
    return summary


def evaluate_together(
    plans: Sequence[EvaluationPlan],
    outputs: Sequence[Path],
    *,
    scratch: Path,
    console: Console | None = None,
    processes: Processes | None = None,
) -> list[EvaluationSummary]:
    """Evaluates several models on the same cells, which share the pictures (`sharing`); each has a folder of its own.

    Args:
        plans: what to do; they differ in the model alone.
        outputs: for each plan its folder.
        scratch: for data that a task makes.
        console: where progress goes; default: standard error.
        processes: who takes part; default: the processes of the launch.

    Returns:
        For each plan its summary.

    Raises:
        InputError: as of `evaluate`.
    """
    console = console or Console(stderr=True)
    processes = processes or join()
    plan = plans[0]
    tasks = [get_task(name) for name in plan.tasks]
    if "frost" in plan.corruptions:
        find_frost_textures()
    recorded = recorded_budget(outputs) if plan.budget_minutes is not None else None
    parse_corrupt_at(plan.corrupt_at)
    if plan.attacks and plan.budget_minutes is not None:
        raise InputError(
            "what an attack costs is not known beforehand", where="--budget", remedy="Choose --limit for attacks."
        )
    start = time.monotonic()
    # The cheap checks first: loading a large model takes minutes.
    for one in plans:
        resolve_model_folder(one.model)
    cells = [cell for task in tasks for cell in _cells(task, plan)]
    with processes.first_before_others():
        items = {
            task.name: list(task.load(plan.data, plan.image_folder, scratch / "data", plan.seed)) for task in tasks
        }
    attacks = PreparedAttacks.of_tasks(plan.attacks, items)
    evaluations = _open(plans, outputs, processes, console)
    for evaluation in evaluations:
        check_corrupt_at(evaluation.model, plan.corrupt_at)
        require_gradients(plan.attacks, evaluation.model)
        evaluation.routing = RoutingRun.of(plan, evaluation.model, evaluation.output, processes.rank, console)
    if plan.budget_minutes is not None:
        _settle_limit(evaluations, recorded, cells, items, start, processes, console)
    with processes.first_before_others():
        if processes.first:
            for evaluation in evaluations:
                evaluation.manifest = check_manifest(evaluation.plan, evaluation.output, items)
            for evaluation in evaluations:
                for cell in cells:  # what an earlier start has left, of however many processes
                    merge_records(evaluation.output / "predictions" / cell.file_name)
                if evaluation.routing is not None:
                    evaluation.routing.forget_unrouted(cells)
    if plan.budget_minutes is not None and not processes.first:
        # What the first process has chosen.
        for evaluation in evaluations:
            limit = json.loads((evaluation.output / "manifest.json").read_text())["limit"]
            evaluation.plan = dataclasses.replace(evaluation.plan, limit=limit)
    _run_cells(evaluations, cells, items, processes, console, attacks)
    if processes.first:
        for evaluation in evaluations:
            _write_results(evaluation, cells, items, processes, time.monotonic() - start, console)
    processes.barrier()
    return [_summary(one.output / "results.json", one.errors, processes) for one in evaluations]


def _open(
    plans: Sequence[EvaluationPlan], outputs: Sequence[Path], processes: Processes, console: Console
) -> list[_Evaluation]:
    models = [open_model(plan.model, device=_device(processes)) for plan in plans]
    labels = [output.name for output in outputs]
    said = console if processes.first else Console(quiet=True)
    encoders = share_encoders(models, labels, batch_size=plans[0].batch_size, console=said)
    return [
        _Evaluation(plan=plan, output=output, model=model, label=label, encoder=encoder)
        for plan, output, model, label, encoder in zip(plans, outputs, models, labels, encoders, strict=True)
    ]


def _settle_limit(
    evaluations: Sequence[_Evaluation],
    recorded: Mapping[str, Any] | None,
    cells: Sequence[Cell],
    items: Items,
    started: float,
    processes: Processes,
    console: Console,
) -> None:
    """Gives all plans the limit of their budget."""
    settled = settle_limit(
        evaluations[0].plan,
        recorded,
        cells,
        items,
        lambda cell: [
            _predictor(one.model, cell.task, one.plan, one.plan.batch_size, one.encoder) for one in evaluations
        ],
        started=started,
        n_models=len(evaluations),
        processes=processes,
        after_chunk=partial(_forget, evaluations),
        console=console,
    )
    for one in evaluations:
        one.plan = dataclasses.replace(settled, model=one.plan.model)


def _forget(evaluations: Sequence[_Evaluation]) -> None:
    for one in evaluations:
        if one.encoder is not None:
            one.encoder.forget()


def _run_cells(
    evaluations: Sequence[_Evaluation],
    cells: Sequence[Cell],
    items: Items,
    processes: Processes,
    console: Console,
    attacks: PreparedAttacks,
) -> None:
    """Cell by cell, all models; their rows of results are found in the first process alone."""
    plan = evaluations[0].plan
    chosen = {cell.file_name: attacks.items(cell, _choose(items[cell.task.name], plan, cell)) for cell in cells}
    total = len(evaluations) * sum(processes.owns(item) for listed in chosen.values() for item in listed)
    name = f"evaluating {', '.join(one.model.router for one in evaluations)}"
    name += f" (process 1 of {processes.size})" if processes.size > 1 else ""
    with EvaluationProgress(console, name, total, silent=not processes.first) as progress:
        for cell in cells:
            respondents = [
                Respondent(
                    predictor=_predictor(one.model_for(cell), cell.task, one.plan, plan.batch_size, one.encoder),
                    path=one.output / "predictions" / cell.file_name,
                )
                for one in evaluations
            ]
            found = run_cell_together(
                cell,
                chosen[cell.file_name],
                respondents,
                progress.advance,
                batch_size=plan.batch_size,
                processes=processes,
                already=progress.already,
                after_chunk=partial(_forget, evaluations),
                attack=attacks.of(cell),
            )
            if not processes.first:
                continue
            for one, records in zip(evaluations, found, strict=True):
                if one.routing is not None:
                    one.routing.finish(cell, [item.id for item in chosen[cell.file_name]])
                of_cell = cell_results(
                    one.plan, cell, one.model.router, chosen[cell.file_name], records, attacks.of(cell)
                )
                one.rows += of_cell
                one.errors.update(record["error"]["type"] for record in records if record["error"])
                progress.cell(f"{one.label}: " if len(evaluations) > 1 else "", cell, of_cell[0])


def _write_results(
    evaluation: _Evaluation,
    cells: Sequence[Cell],
    items: Items,
    processes: Processes,
    seconds: float,
    console: Console,
) -> None:
    plan, output, model = evaluation.plan, evaluation.output, evaluation.model
    surroundings = _surroundings(plan, evaluation.manifest, model, processes, seconds)
    baselines = [b for name, listed in items.items() for b in constant_baselines(name, listed, seed=plan.seed)]
    if plan.budget is not None and (widths := half_widths(evaluation.rows)) is not None:
        surroundings["half_widths"] = widths
        median, largest = widths["median"], widths["largest"]
        said = f"half widths of the 95 % intervals: median {median:.3f}, largest {largest:.3f}"
        console.print(f"{evaluation.label}: {said}")
    document = {"results": evaluation.rows, "baselines": baselines, "provenance": surroundings}
    if plan.attacks:
        document["attacks"] = attack_summary(cells, output / "predictions")
    if plan.check_batch:
        document["batch_check"] = _check_batches(plan, output, cells, items, model, console)
    if evaluation.routing is not None:
        document["robustness"] = evaluation.routing.results(cells, items, plan.model, seed=plan.seed)
    write_json(output / "results.json", document)
    record = Path(resolve_model_folder(plan.model)) / "training.json"
    if record.is_file():
        shutil.copyfile(record, output / "training.json")


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
        if cell.is_clean
    ]
    for one in found:
        console.print(
            f"{one['task']}: of {one['n_items']} questions asked alone and in batches of {one['batch_size']}, "
            f"{len(one['text_differences'])} have another answer and {len(one['score_flips'])} another score"
        )
    record_batch_check(output, all(one["batch_invariant"] for one in found))
    return found


def _predictor(
    model: OpenedModel, task: Task, plan: EvaluationPlan, batch_size: int, encoder: SharedEncoder | None = None
) -> AnswersItems:
    longest = plan.max_new_tokens or task.max_new_tokens
    options = task.options if plan.scoring == "likelihood" else None
    return model.predictor(batch_size=batch_size, max_new_tokens=longest, options=options, encoder=encoder)


def _cells(task: Task, plan: EvaluationPlan) -> list[Cell]:
    grid = [("none", 0)] + [(name, severity) for name in plan.corruptions for severity in plan.severities]
    common: dict[str, Any] = {"task": task, "seed": plan.seed, "corrupt_at": plan.corrupt_at}
    return [
        Cell(corruption=name, severity=severity, attack=attack, **common)
        for attack in ("none", *(attack.spec for attack in plan.attacks))
        for name, severity in grid
    ]


def _choose(items: Sequence[EvaluationItem], plan: EvaluationPlan, cell: Cell) -> list[EvaluationItem]:
    limit = plan.limit if cell.is_clean or plan.corrupted_limit is None else plan.corrupted_limit
    return first_pictures(items, plan.seed, limit)


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
        corrupt_at=plan.corrupt_at,
        data=None if plan.data is None else str(plan.data.resolve() if plan.data.exists() else plan.data),
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
        attack = "" if row["attack"] == "none" else f"/{row['attack']}"
        headlines.setdefault(f"{row['task']}/{row['corruption']}/{row['severity']}{attack}", row)
    return EvaluationSummary(
        results=results,
        headline={cell: row["value"] for cell, row in headlines.items()},
        num_errors=sum(row["n_errors"] for row in headlines.values()),
        errors=dict(errors),
        first_process=processes.first,
    )
