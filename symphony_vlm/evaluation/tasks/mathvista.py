"""MathVista, testmini: mathematics in pictures (Lu et al., arXiv 2310.02255; lupantech/MathVista).

Files: ``testmini.json`` (``{pid: problem}``), or AI4Math/MathVista. The official score needs a judge to find the answer
in the response: ``--export`` writes what it reads, and its output (``{pid: {..., response, extraction}}``) is scored as
it is, with or without annotations. Without a judge, rules find some answers and the rest is ``unparsed``, thus wrong.

The official rule takes the nearest choice for whatever was extracted, the empty string included;
``accuracy_ignore_empty`` counts those as wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from symphony_vlm.evaluation.benchmark_files import SAID, picture
from symphony_vlm.evaluation.breakdown import by_kind
from symphony_vlm.evaluation.judgements import known_score, not_judged
from symphony_vlm.evaluation.loading import needed, unique
from symphony_vlm.evaluation.metrics import Metric, Outcome, mean_of
from symphony_vlm.evaluation.predictions import ID_FIELDS, answer_text, join_answers
from symphony_vlm.evaluation.rows import Row, read_rows
from symphony_vlm.evaluation.rules.mathvista import normalize_extraction, quick_extraction
from symphony_vlm.evaluation.task import EvaluationItem, Scored, Task
from symphony_vlm.evaluation.typed_fields import number_or_none, object_or_empty, text_or_none, texts

__all__ = ["TASK"]

_FIELDS = ("question", "choices", "unit", "precision", "answer", "question_type", "answer_type", "metadata")
_METADATA = ("language", "source", "category", "task", "context", "grade", "skills")
_HINTS = {
    "multi_choice": "answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.",
    "integer": "answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the "
    "end.",
    "float1": "answer the question requiring a floating-point number with one decimal place and provide the final "
    "value, e.g., 1.2, 1.3, 1.4, at the end.",
    "float2": "answer the question requiring a floating-point number with two decimal places and provide the final "
    "value, e.g., 1.23, 1.34, 1.45, at the end.",
    "list": "answer the question requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], "
    "[1.2, 1.3, 1.4], at the end.",
}
"""What the authors ask for, by kind of question."""


def _load(data: Path | None, image_folder: Path | None, scratch: Path, seed: int) -> Sequence[EvaluationItem]:
    data = needed(data, "testmini.json, or AI4Math/MathVista")
    rows = read_rows(data, as_pairs=("pid", "response"), split=None if data.is_file() else "testmini")
    return unique((_item(row, data, image_folder) for row in rows), data)


def _item(row: Row, data: Path, image_folder: Path | None) -> EvaluationItem:
    images, key = picture(row, data, image_folder, "decoded_image", "image")
    row.text("question"), number_or_none(row, "precision"), object_or_empty(row, "metadata")
    problem: dict[str, Any] = {name: row.fields.get(name) for name in _FIELDS}
    problem |= {name: row.text(name) for name in ("question_type", "answer_type")}
    choices = texts(row, "choices")
    if problem["question_type"] == "multi_choice" and not choices:
        raise row.error("a multi_choice question has no choices")
    answer = text_or_none(row, "answer")
    return EvaluationItem(
        id=row.text("pid"),
        question=row.text("query") if row.fields.get("query") else _query(problem, choices),
        answers=() if answer is None else (answer,),
        images=images,
        image_key=key,
        group=problem["question_type"],
        # Not in `choices`, whose answers are letters: here the answer is the choice's text.
        meta={"problem": problem, "choices": choices},
        asked=str(problem["question"]),
    )


def _query(problem: Mapping[str, Any], choices: Sequence[str]) -> str:
    """The authors' zero-shot query: a hint, the question with its unit, the choices."""
    kind = problem["question_type"] if problem["question_type"] == "multi_choice" else problem["answer_type"]
    hint = _HINTS.get(f"float{int(problem['precision'] or 1)}" if kind == "float" else kind)
    unit = f" (Unit: {problem['unit']})" if problem["unit"] else ""
    lines = [f"Hint: Please {hint}"] if hint else []
    lines.append(f"Question: {problem['question']}{unit}")
    if choices:
        lines += ["Choices:", *(f"({chr(ord('A') + i)}) {choice}" for i, choice in enumerate(choices))]
    return "\n".join(lines)


def score(prediction: str, item: EvaluationItem) -> Scored:
    """Equal to the answer, by the judge's extraction if the item brings one, else by rules alone."""
    if not item.answers:
        return not_judged(prediction)
    problem = item.meta["problem"]
    kind = problem["question_type"], problem["answer_type"]
    response = prediction.strip()
    extraction, choices = item.meta.get("extraction"), item.meta["choices"]
    if extraction is None:
        extraction = quick_extraction(response, choices, *kind)
    if extraction is None:
        return Scored(score=0.0, parsed="", status="unparsed")
    found = normalize_extraction(extraction, choices, *kind, problem["precision"])
    right = float(found == item.answers[0])
    if not str(extraction).strip():
        return Scored(score=right, parsed=found or "", status="empty")
    return Scored(score=right, parsed=found or "", status="ok" if found is not None else "unparsed")


def _responses(path: Path) -> list[tuple[Row, str | None]]:
    rows = read_rows(path, as_pairs=("pid", "response"))
    return [(row, _response(row)) for row in rows]


def _response(row: Row) -> str | None:
    fields = ("response", *SAID)
    # What a judge extracted can be scored without the response.
    return "" if "extraction" in row.fields and not row.fields.keys() & {*fields} else answer_text(row, fields)


def _judged(item: EvaluationItem, row: Row) -> EvaluationItem:
    if "extraction" not in row.fields:
        return item
    extraction = row.fields["extraction"]
    return replace(item, meta={**item.meta, "extraction": "" if extraction is None else extraction})


def read_results(path: Path, items: Sequence[EvaluationItem]) -> list[tuple[EvaluationItem, str]]:
    """Responses, with the judge's extractions where there are any."""
    rows = {row.text("pid", *ID_FIELDS): row for row, _ in _responses(path)}
    found = join_answers(
        ((row, row.text("pid", *ID_FIELDS), text) for row, text in _responses(path) if text is not None), items
    )
    return [(_judged(item, rows[item.id]), found[item.id]) for item in items if item.id in found]


def _self_contained(path: Path) -> list[tuple[EvaluationItem, str]]:
    pairs = [(_judged(_item(row, path, None), row), text) for row, text in _responses(path) if text is not None]
    unique((item for item, _ in pairs), path)
    return pairs


def _not_from_nothing(outcome: Outcome) -> float | None:
    return 0.0 if outcome.scored.status == "empty" else known_score(outcome)


def _metrics(outcomes: Sequence[Outcome]) -> list[Metric]:
    metrics = [mean_of("accuracy", known_score), mean_of("accuracy_ignore_empty", _not_from_nothing)]
    for name in ("question_type", "answer_type", *_METADATA):
        metrics += by_kind(f"accuracy/{name}", outcomes, partial(_kinds, name=name))
    return metrics


def _kinds(outcome: Outcome, name: str) -> tuple[str, ...]:
    problem = outcome.item.meta["problem"]
    value = problem[name] if name in problem else (problem["metadata"] or {}).get(name)
    if value is None:
        return ()
    return tuple(map(str, value)) if isinstance(value, (list, tuple)) else (str(value),)


def _export(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What the authors' ``extract_answer.py`` reads."""
    return {
        outcome.item.id: {
            "pid": outcome.item.id,
            "query": outcome.item.question,
            **outcome.item.meta["problem"],
            "response": (outcome.prediction or "").strip(),
        }
        for outcome in outcomes
    }


TASK = Task(
    name="mathvista",
    split="testmini",
    load=_load,
    score=score,
    max_new_tokens=1024,
    metrics=_metrics,
    read_results=read_results,
    read_self_contained=_self_contained,
    counts={"testmini": 1000},
    export=_export,
)
