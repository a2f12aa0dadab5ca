"""Reads evaluation folders for a report and puts several of them side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.robustness import Cell, CellRecords, ModelScores

__all__ = ["Baseline", "Evaluation", "ModelInfo", "ReportData", "collect", "load_evaluation", "read_lines"]

Row = dict[str, Any]

_FIELDS: Mapping[str, tuple[type, ...]] = {
    "model": (str,),
    "router": (str, type(None)),
    "task": (str,),
    "corruption": (str,),
    "severity": (int,),
    "metric": (str,),
    "value": (int, float, type(None)),
}
_KEY = ("model", "router", "task", "split", "corruption", "severity", "metric", "attack")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation folder, as read."""

    folder: Path
    document: dict[str, Any]
    """results.json."""
    manifest: dict[str, Any]
    training: dict[str, Any] | None
    records: Mapping[tuple[str, str | None, Cell], CellRecords]
    """By task, split and cell."""
    files: Mapping[tuple[str, Cell], Path]
    attacked_records: Mapping[tuple[str, str | None, Cell, str], CellRecords] = field(default_factory=dict)
    """By task, split, cell and attack; those without an attack are in `records` alone."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """One model of the report; it may come from several folders (say, one per task)."""

    label: str
    model: str
    router: str
    evaluations: tuple[Evaluation, ...]

    @property
    def training(self) -> dict[str, Any] | None:
        """The first training record among its folders."""
        return next((e.training for e in self.evaluations if e.training), None)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What answers that do not look at the picture reach."""

    name: str
    label: str
    """The model it was measured with."""
    task: str
    metric: str
    value: float | None
    ci_low: float | None
    ci_high: float | None
    n_items: int | None


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything the report shows."""

    models: tuple[ModelInfo, ...]
    """In the order of the folders: the first is the baseline."""
    rows: tuple[Row, ...]
    """All results without an attack, sorted."""
    scores: tuple[ModelScores, ...]
    """One per task and model, tasks sorted, models in their order."""
    baselines: tuple[Baseline, ...]
    attacked_rows: tuple[Row, ...] = ()
    """All results under an attack, sorted."""
    warnings: tuple[str, ...] = field(default=())


def load_evaluation(folder: Path) -> Evaluation:
    """Reads one evaluation folder (or the results.json in it).

    Raises:
        InputError: The folder or its results.json is missing, or a file does not hold what it should.
    """
    path = Path(folder)
    path = path.parent if path.name == "results.json" else path
    if not path.is_dir():
        raise InputError("no such folder", where=str(path), remedy="Name a folder written by 'symphony-vlm eval'")
    results = path / "results.json"
    if not results.is_file():
        raise InputError("no results.json here", where=str(results), remedy="Run 'symphony-vlm eval' to its end first")
    document = _read_object(results)
    _check_rows(document.get("results"), results)
    if not isinstance(document.get("baselines", []), list):
        raise InputError("'baselines' is not a list", where=str(results))
    every: dict[tuple[str, str | None, Cell, str], CellRecords] = {}
    files: dict[tuple[str, Cell], Path] = {}
    for file in sorted((path / "predictions").glob("*.jsonl")):
        for key, part in _read_predictions(file).items():
            if key in every:
                raise InputError(f"task, split, cell and attack {key} are also in another file", where=str(file))
            every[key] = part
            if key[3] == "none":
                files[key[0], key[2]] = file
    training, manifest = path / "training.json", path / "manifest.json"
    return Evaluation(
        folder=path,
        document=document,
        manifest=_read_object(manifest) if manifest.is_file() else {},
        training=_read_object(training) if training.is_file() else None,
        records={key[:3]: part for key, part in every.items() if key[3] == "none"},
        files=files,
        attacked_records={key: part for key, part in every.items() if key[3] != "none"},
    )


def read_lines(path: Path) -> Iterator[Row]:
    """The records of one predictions file.

    Raises:
        InputError: A line is not a JSON object; the message names it.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}: line {number}"
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    remedy = "Run the evaluation again: it repairs a torn last line and continues"
                    raise InputError(f"not valid JSON ({error.msg})", where=where, remedy=remedy) from error
                if not isinstance(record, dict):
                    raise InputError("expected a JSON object", where=where)
                yield record


def collect(evaluations: Sequence[Evaluation]) -> ReportData:
    """Merges evaluations of one or more models.

    Raises:
        InputError: Two folders hold the same cell of the same model.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    owners: dict[tuple[str, str], list[Evaluation]] = {}
    for evaluation in evaluations:
        for row in evaluation.document["results"]:
            key = _row_key(row)
            if key in rows:
                text = ", ".join(f"{name} {value!r}" for name, value in zip(_KEY, key, strict=True))
                where = str(evaluation.folder / "results.json")
                raise InputError(f"{text} is there twice", where=where, remedy="Name each evaluation once")
            rows[key] = row
            owner = owners.setdefault((row["model"], row["router"] or "none"), [])
            if evaluation not in owner:
                owner.append(evaluation)
    labels = _labels(list(owners))
    models = tuple(
        ModelInfo(label=labels[key], model=key[0], router=key[1], evaluations=tuple(owner))
        for key, owner in owners.items()
    )
    ordered = tuple(rows[key] for key in sorted(rows, key=lambda key: tuple(str(part) for part in key)))
    attacked = tuple(row for row in ordered if row.get("attack", "none") != "none")
    ordered = tuple(row for row in ordered if row.get("attack", "none") == "none")
    baselines = tuple(baseline for model in models for baseline in _baselines(model))
    scores = _scores(models, ordered, baselines)
    return ReportData(
        models=models,
        rows=ordered,
        scores=scores,
        baselines=_merge_equal(baselines, len(models)),
        attacked_rows=attacked,
    )


def _row_key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name, "none" if name == "attack" else None) for name in _KEY)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"not valid JSON ({error})", where=str(path)) from error
    if not isinstance(content, dict):
        raise InputError("expected a JSON object", where=str(path))
    return content


def _check_rows(rows: Any, path: Path) -> None:
    if not isinstance(rows, list) or not rows:
        raise InputError("'results' is not a list with at least one entry", where=str(path))
    for number, row in enumerate(rows):
        where = f"{path}: results[{number}]"
        if not isinstance(row, dict):
            raise InputError("expected a JSON object", where=where)
        for name, kinds in _FIELDS.items():
            if name not in row:
                raise InputError(f"field '{name}' is missing", where=where)
            value = row[name]
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise InputError(f"field '{name}' is {value!r}, expected {_kind_names(kinds)}", where=where)
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"field '{name}' is {value!r}, expected a finite number or null", where=where)


def _kind_names(kinds: Sequence[type]) -> str:
    words = {str: "text", int: "a whole number", float: "a number", type(None): "null"}
    return " or ".join(words[kind] for kind in kinds)


def _read_predictions(path: Path) -> dict[tuple[str, str | None, Cell, str], CellRecords]:
    grouped: dict[tuple[str, str | None, Cell, str], dict[str, Row]] = {}
    for number, record in enumerate(read_lines(path), start=1):
        try:
            cell = (record["corruption"], int(record["severity"]))
            key = (record["task"], record.get("split"), cell, record.get("attack", "none"))
            item, score = str(record["item_id"]), record["score"]
            if score is not None:
                float(score)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"record {number} lacks or spoils the field {error}", where=str(path)) from error
        if grouped.setdefault(key, {}).setdefault(item, record) is not record:
            raise InputError(f"item {item!r} occurs twice in its cell", where=str(path))
    return {key: _cell_records(list(records.values())) for key, records in grouped.items()}


def _cell_records(records: Sequence[Row]) -> CellRecords:
    ids = [str(record["item_id"]) for record in records]
    # An item without an image is a cluster of its own.
    images = [str(r.get("image_key") or r.get("image_sha256") or item) for r, item in zip(records, ids, strict=True)]
    scores = [math.nan if record["score"] is None else float(record["score"]) for record in records]
    return CellRecords(
        item_ids=tuple(ids),
        images=tuple(images),
        scores=np.array(scores, dtype=np.float64),
        answers=tuple(_answer(record) for record in records),
        pixels=tuple(record.get("pixels_sha256") for record in records),
        statuses=_statuses(records),
        lenient=_lenient(records),
    )


def _statuses(records: Sequence[Row]) -> tuple[str, ...]:
    told = [record.get("parse_status") for record in records]
    return tuple(map(str, told)) if all(isinstance(status, str) for status in told) else ()


def _lenient(records: Sequence[Row]) -> np.ndarray | None:
    scores = [record.get("lenient") for record in records]
    numbers = [float(s) if isinstance(s, int | float) else math.nan for s in scores]
    return None if all(map(math.isnan, numbers)) else np.array(numbers, dtype=np.float64)


def _answer(record: Row) -> str:
    parsed = record.get("parsed")
    return str(record.get("prediction") or "").strip() if parsed in (None, "") else str(parsed)


def _labels(keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """The router's name; where two models share it, with the part of their paths that differs."""
    labels: dict[tuple[str, str], str] = {}
    for model, router in keys:
        same = [Path(other).parts for other, name in keys if name == router]
        own = Path(model).parts
        different = [part for i, part in enumerate(own) if any(len(o) <= i or o[i] != part for o in same)]
        labels[model, router] = f"{router} ({'/'.join(different) or model})" if len(same) > 1 else router
    return labels


def _baselines(model: ModelInfo) -> Iterator[Baseline]:
    for evaluation in model.evaluations:
        for row in evaluation.document.get("baselines") or []:
            if isinstance(row, dict) and "name" in row and "task" in row:
                yield Baseline(
                    name=str(row["name"]),
                    label=model.label,
                    task=str(row["task"]),
                    metric=str(row.get("metric", "accuracy")),
                    value=row.get("value"),
                    ci_low=row.get("ci_low"),
                    ci_high=row.get("ci_high"),
                    n_items=row.get("n_items"),
                )


def _merge_equal(baselines: Sequence[Baseline], n_models: int) -> tuple[Baseline, ...]:
    """One line for a baseline that is the same for every model (the constant answer needs no model)."""
    groups: dict[tuple[Any, ...], list[Baseline]] = {}
    for b in baselines:
        groups.setdefault((b.task, b.metric, b.name, b.value, b.ci_low, b.ci_high, b.n_items), []).append(b)
    merged: list[Baseline] = []
    for same in groups.values():
        if len(same) == n_models:
            merged.append(Baseline(**{**same[0].__dict__, "label": "every model" if n_models > 1 else same[0].label}))
        else:
            merged.extend(same)
    return tuple(merged)


def _scores(models: Sequence[ModelInfo], rows: Sequence[Row], baselines: Sequence[Baseline]) -> tuple[ModelScores, ...]:
    splits: dict[str, set[str | None]] = {}
    for row in rows:
        splits.setdefault(row["task"], set()).add(row.get("split"))
    result: list[ModelScores] = []
    for task, task_splits in sorted(splits.items()):
        for split in sorted(task_splits, key=str):
            mine = [row for row in rows if row["task"] == task and row.get("split") == split]
            metric = _headline_metric(mine, _first_metric(models, task, split))
            for model in models:
                values = {
                    # As a share of the best value: robustness compares 1 - score (MME's perception / 2000).
                    (row["corruption"], row["severity"]): _share_of_best(row)
                    for row in mine
                    if row["metric"] == metric
                    and (row["model"], row["router"] or "none") == (model.model, model.router)
                }
                if values:
                    chance = _best_constant(baselines, task, metric)
                    result.append(
                        ModelScores(
                            label=model.label,
                            model=model.model,
                            router=model.router,
                            task=task if len(task_splits) == 1 else f"{task}/{split}",
                            metric=metric,
                            values=values,
                            records=_records_of(model, task, split, len(task_splits) == 1),
                            chance=None if chance is None else chance.value,
                            chance_name="constant answer" if chance is None else chance.name,
                            best=max(float(row.get("scale", 1.0)) for row in mine if row["metric"] == metric),
                        )
                    )
    return tuple(result)


def _best_constant(baselines: Sequence[Baseline], task: str, metric: str) -> Baseline | None:
    constant = [b for b in baselines if b.task == task and b.metric == metric and "constant" in b.name]
    return max((b for b in constant if b.value is not None), key=lambda b: b.value or 0.0, default=None)


def _share_of_best(row: Row) -> float | None:
    value = row["value"]
    return None if value is None else value / row.get("scale", 1.0)


def _first_metric(models: Sequence[ModelInfo], task: str, split: str | None) -> str | None:
    """What the evaluation names first of a task."""
    documents = (evaluation.document for model in models for evaluation in model.evaluations)
    rows = (row for document in documents for row in document["results"])
    return next((row["metric"] for row in rows if (row["task"], row.get("split")) == (task, split)), None)


def _headline_metric(rows: Sequence[Row], first: str | None) -> str:
    names = [row["metric"] for row in rows if row.get("higher_is_better", True)] or [rows[0]["metric"]]
    plain = [name for name in names if "/" not in name] or names
    if "accuracy" in plain:
        return "accuracy"
    return first if first is not None and first in plain else str(plain[0])


def _records_of(model: ModelInfo, task: str, split: str | None, only_split: bool) -> dict[Cell, CellRecords]:
    result: dict[Cell, CellRecords] = {}
    for evaluation in model.evaluations:
        owners = {(row["model"], row["router"] or "none") for row in evaluation.document["results"]}
        if owners != {(model.model, model.router)}:
            continue  # A folder of several models does not say whose predictions these are.
        for (name, part, cell), records in evaluation.records.items():
            if name == task and (part == split or (only_split and part is None)):
                result[cell] = records
    return result
