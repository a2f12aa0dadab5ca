"""MM-Vet: 218 open questions that a judge grades (Yu et al., arXiv 2308.02490; yuweihao/MM-Vet).

Files: ``mm-vet.json`` (``{id: {imagename, question, answer, capability}}``), or lmms-lab/MMVet. ``--export`` writes
``{"v1_<id>": text}``, which the authors' evaluator grades; its grades (``{id: {model, content, score}}``, a score per
run) are read in place of predictions, and give figures per capability if the annotations are there too. Answers
nobody has graded have no score. Another judge than gpt-4-0613 moves the total by some three points, so the judge's name
is in a figure's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from symphony_vlm.evaluation.benchmark_files import picture
from symphony_vlm.evaluation.breakdown import by_kind
from symphony_vlm.evaluation.judgements import known_score, not_judged
from symphony_vlm.evaluation.loading import needed, unique
from symphony_vlm.evaluation.metrics import Metric, Outcome, mean_of
from symphony_vlm.evaluation.predictions import ID_FIELDS, answer_text, join_answers
from symphony_vlm.evaluation.rows import Row, read_rows
from symphony_vlm.evaluation.task import EvaluationItem, ParseStatus, Scored, Task
from symphony_vlm.evaluation.typed_fields import texts

__all__ = ["TASK"]


def _load(data: Path | None, image_folder: Path | None, scratch: Path, seed: int) -> Sequence[EvaluationItem]:
    data = needed(data, "mm-vet.json, or lmms-lab/MMVet")
    file = data / "mm-vet.json" if (data / "mm-vet.json").is_file() else data
    rows = read_rows(file, as_pairs=("id", "answer"), split=None if file.is_file() else "test")
    return unique((_item(row, file, image_folder) for row in rows), file)


def _item(row: Row, file: Path, image_folder: Path | None) -> EvaluationItem:
    beside = file.parent / "images"
    folder = image_folder or (beside if file.is_file() and beside.is_dir() else None)
    images, key = picture(row, file, folder, "image", "imagename")
    capability = row.fields.get("capability")
    names = capability.split(",") if isinstance(capability, str) else texts(row, "capability")
    return EvaluationItem(
        id=_own_id(row.text("id", "question_id")),
        question=row.text("question"),
        answers=(row.text("answer"),),
        images=images,
        image_key=key,
        meta={"capabilities": tuple(name.strip() for name in names)},
    )


def _own_id(name: str) -> str:
    """LLaVA's question file leaves the ``v1_`` of the authors' ids out."""
    return name if name.startswith("v1_") else f"v1_{name}"


def score(prediction: str, item: EvaluationItem) -> Scored:
    """The mean of the judge's grades, if the item brings any."""
    grades: Sequence[float] | None = item.meta.get("grades")
    if not grades:
        return not_judged(prediction)
    # After five answers that are no number the authors' script stores 0: the score stands, but it says so.
    failed = any(not _is_number(content) for content in item.meta["contents"])
    status: ParseStatus = "unparsed" if failed else "ok"
    return Scored(score=sum(grades) / len(grades), parsed=", ".join(map(str, grades)), status=status)


def read_results(path: Path, items: Sequence[EvaluationItem]) -> list[tuple[EvaluationItem, str]]:
    """Grades or, of answers nobody has graded, the answers."""
    rows = read_rows(path, as_pairs=("id", "text"))
    graded = _graded(rows)
    named = [(row, _own_id(row.text(*ID_FIELDS))) for row in rows]
    texts = [(row, name, "" if graded else answer_text(row)) for row, name in named]
    found = join_answers(((row, name, text) for row, name, text in texts if text is not None), items)
    by_id = {name: row for row, name in named}
    pairs = [(item, found[item.id]) for item in items if item.id in found]
    return [(_with_grades(item, by_id[item.id]), text) for item, text in pairs] if graded else pairs


def _self_contained(path: Path) -> list[tuple[EvaluationItem, str]]:
    """Grades alone: a total, but no capabilities."""
    rows = read_rows(path, as_pairs=("id", "text"))
    if not _graded(rows):
        raise rows[0].error(
            "is not graded: there is no field 'score'",
            remedy="Add --annotations mm-vet.json with --export to write what the judge reads.",
        )
    items = [
        EvaluationItem(id=name, question="", answers=("",), image_key=name, meta={"capabilities": ()})
        for name in (_own_id(row.text(*ID_FIELDS)) for row in rows)
    ]
    unique(items, path)
    return [(_with_grades(item, row), "") for item, row in zip(items, rows, strict=True)]


def _graded(rows: Sequence[Row]) -> bool:
    have = [row for row in rows if "score" in row.fields and "prediction" not in row.fields]
    if have and len(have) < len(rows):
        odd = next(row for row in rows if row not in have)
        raise odd.error("is not graded, while other answers of the file are", remedy="Let the judge finish.")
    lengths = {len(row.fields["score"]) for row in have if isinstance(row.fields["score"], list)}
    if len(lengths) > 1:
        raise have[0].error(f"answers have different numbers of runs ({', '.join(map(str, sorted(lengths)))})")
    return bool(have)


def _with_grades(item: EvaluationItem, row: Row) -> EvaluationItem:
    value = row.fields["score"]
    grades = value if isinstance(value, list) else [value]
    if not grades or not all(_is_grade(grade) for grade in grades):
        raise row.error(f"field 'score' is {value!r}; it must be a list of numbers in 0 to 1, one a run")
    models = row.fields.get("model")
    judges = sorted({str(name) for name in (models if isinstance(models, list) else [models]) if name})
    contents = row.fields.get("content")
    more = {
        "grades": [float(grade) for grade in grades],
        "contents": contents if isinstance(contents, list) else [],
        "judges": judges,
    }
    return replace(item, meta={**item.meta, **more})


def _is_number(content: object) -> bool:
    """Whether the judge's words begin with a grade, as the authors' script reads them."""
    try:
        return _is_grade(float(str(content).split(" ")[0]))
    except ValueError:
        return False


def _is_grade(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _metrics(outcomes: Sequence[Outcome]) -> list[Metric]:
    """Every answer has as many runs, so that the mean over runs of the means is the mean of the answers' means."""
    judges = sorted({name for outcome in outcomes for name in outcome.item.meta.get("judges", ())})
    graded = any("grades" in outcome.item.meta for outcome in outcomes)
    if not graded:
        # Missing answers alone would make a total of 0.
        return [mean_of("total", lambda outcome: None, scale=100.0)]
    return [
        mean_of("total", known_score, scale=100.0),
        mean_of(f"total (judge: {', '.join(judges) or 'not named'})", known_score, scale=100.0),
        *by_kind("total", outcomes, lambda outcome: outcome.item.meta["capabilities"], scale=100.0),
    ]


def _export(outcomes: Sequence[Outcome]) -> Mapping[str, Any]:
    """What the authors' evaluator grades."""
    return {outcome.item.id: (outcome.prediction or "").strip() for outcome in outcomes}


TASK = Task(
    name="mmvet",
    split="test",
    load=_load,
    score=score,
    max_new_tokens=1024,
    metrics=_metrics,
    read_results=read_results,
    read_self_contained=_self_contained,
    counts={"v1": 218},
    export=_export,
)
