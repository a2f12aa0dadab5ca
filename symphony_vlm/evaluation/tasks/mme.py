"""MME (Fu et al. 2023, BradyFU/Awesome-Multimodal-Large-Language-Models): two yes-no questions a picture.

A subtask's score is 100 accuracy over questions plus 100 accuracy+ over pictures (both questions right).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from symphony_vlm.data.fields import shortened
from symphony_vlm.data.sample import ImageRef
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.item import EvaluationItem, Outcome, Scored
from symphony_vlm.evaluation.loading import key_of, needed, unique
from symphony_vlm.evaluation.metrics import Metric, share
from symphony_vlm.evaluation.predictions import ID_FIELDS, join_answers, read_answers_by
from symphony_vlm.evaluation.rows import Row, read_rows, read_text
from symphony_vlm.evaluation.rules.yes_no import SHORT_INSTRUCTION, first_yes_no, mme_answer
from symphony_vlm.evaluation.statistics import Floats
from symphony_vlm.evaluation.task import Task

__all__ = ["COGNITION", "PERCEPTION", "TASK"]

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

_INSTRUCTION = " Please answer yes or no."
_PICTURES = (".jpg", ".png", ".jpeg")


def _load(data: Path | None, image_folder: Path | None, scratch: Path, seed: int) -> Sequence[EvaluationItem]:
    data = needed(data, "the folder of MME's 14 text files or of its 14 sub-folders, or lmms-lab/MME")
    if any((data / f"{subtask}.txt").is_file() for subtask in PERCEPTION + COGNITION):
        items = [_tool_item(row, image_folder) for row in _tool_rows(data)]
    elif any((data / subtask).is_dir() for subtask in PERCEPTION + COGNITION):
        items = list(_release_items(data))
    else:
        rows = read_rows(data, split="test")
        items = [_table_item(row, image_folder or data.parent) for row in rows]
    return _paired(unique(items, data), data)


def _tool_rows(folder: Path) -> Iterator[Row]:
    """Lines of ``<subtask>.txt``: image, question, answer and, in results, the prediction."""
    for subtask in PERCEPTION + COGNITION:
        path = folder / f"{subtask}.txt"
        if path.is_file():
            for number, line in enumerate(read_text(path).split("\n"), start=1):
                values = line.removesuffix("\r").split("\t")
                row = Row(
                    dict(zip(("image", "question", "answer", "prediction"), values, strict=False))
                    | {"category": subtask},
                    f"{path.name}: line {number}",
                )
                if len(values) in (3, 4):
                    yield row
                elif line.strip():
                    raise row.error(
                        f"has {len(values)} columns; it must have image, question, answer and, in results, the "
                        "prediction, separated by tabs"
                    )


def _tool_item(row: Row, folder: Path | None) -> EvaluationItem:
    subtask, image = row.text("category"), row.text("image")
    images = row.images("image", folder=folder / subtask) if folder else ()
    return _item(row, subtask, image, row.text("question"), row.text("answer"), images)


def _release_items(folder: Path) -> Iterator[EvaluationItem]:
    """The data as released: a text file a picture, beside it or in ``questions_answers_YN``."""
    for subtask in PERCEPTION + COGNITION:
        base = folder / subtask
        apart = (base / "questions_answers_YN").is_dir()
        for path in sorted((base / "questions_answers_YN" if apart else base).glob("*.txt")):
            picture = next(
                (
                    found
                    for end in _PICTURES
                    if (found := (base / "images" if apart else base) / (path.stem + end)).exists()
                ),
                None,
            )
            images = (ImageRef(path=picture, name=f"{subtask}/{picture.name}"),) if picture else ()
            for number, line in enumerate(read_text(path).split("\n"), start=1):
                if line.strip():
                    row = Row({}, f"{subtask}/{path.name}: line {number}")
                    question, tab, answer = line.partition("\t")
                    if not tab:
                        raise row.error("must be a question, a tab, and Yes or No")
                    yield _item(row, subtask, path.stem, question, answer, images)


def _table_item(row: Row, folder: Path) -> EvaluationItem:
    name = row.text("question_id", "image")
    subtask = row.text("category") if row.fields.get("category") else name.partition("/")[0]
    return _item(
        row, subtask, name, row.text("question", "text"), row.text("answer"), row.images("image", folder=folder)
    )


def _item(
    row: Row, subtask: str, image: str, question: str, answer: str, images: tuple[ImageRef, ...]
) -> EvaluationItem:
    if subtask not in PERCEPTION + COGNITION:
        raise row.error(
            f"{shortened(subtask)} is no subtask of MME", remedy=f"Subtasks: {', '.join(PERCEPTION + COGNITION)}."
        )
    answer = answer.strip().lower()
    if answer not in ("yes", "no"):
        raise row.error(f"the answer is {shortened(answer)}; it must be Yes or No")
    picture = f"{subtask}/{PurePosixPath(image).stem}"
    return EvaluationItem(
        id=_key(subtask, image, question),
        question=question.replace(_INSTRUCTION, "").strip() + SHORT_INSTRUCTION,
        answers=(answer,),
        images=images,
        image_key=key_of(images, picture),
        group=subtask,
        meta={"picture": picture},
    )


def _key(subtask: str, image: str, question: str) -> str:
    question = question.replace(SHORT_INSTRUCTION, "").replace(_INSTRUCTION.strip(), "")
    return f"{subtask}/{PurePosixPath(image).stem}/{' '.join(question.split())}"


def _paired(items: list[EvaluationItem], data: Path) -> list[EvaluationItem]:
    """Questions of one picture together: accuracy+ needs both."""
    asked = Counter(item.meta["picture"] for item in items)
    odd = next((picture for picture, n in asked.items() if n != 2), None)
    if odd is not None:
        raise InputError(f"{odd} has {asked[odd]} question(s); MME asks two about each picture", where=str(data))
    order = {picture: place for place, picture in enumerate(asked)}
    return sorted(items, key=lambda item: order[item.meta["picture"]])


def _score(prediction: str, item: EvaluationItem) -> Scored:
    parsed = mme_answer(prediction)
    return Scored(
        score=float(parsed == item.answers[0]),
        parsed=parsed,
        status="empty" if not prediction.strip() else "unparsed" if parsed == "other" else "ok",
        lenient=float(first_yes_no(prediction) == item.answers[0]),
    )


def _read(path: Path, items: Sequence[EvaluationItem]) -> dict[str, str]:
    if path.is_dir():
        return join_answers(
            ((row, _row_key(row), row.text("prediction")) for row in _tool_rows(path)),
            items,
        )
    return read_answers_by(_row_key, path, items)


def _row_key(row: Row) -> str:
    if row.fields.get("item_id") is not None:
        return row.text("item_id")
    if "category" in row.fields and "image" in row.fields:
        return _key(row.text("category"), row.text("image"), row.text("question"))
    name = row.text(*ID_FIELDS)
    return _key(name.partition("/")[0], name, row.text("prompt", "question"))


def _self_contained(path: Path) -> list[tuple[EvaluationItem, str]]:
    """A folder of result files, whose lines have the truth and the prediction."""
    if not path.is_dir():
        raise InputError(
            "lacks the truth", where=str(path), remedy="Add --annotations, or give the folder of the 14 result files."
        )
    pairs = [(_tool_item(row, None), row.text("prediction")) for row in _tool_rows(path)]
    if not pairs:
        raise InputError(
            "holds none of MME's 14 result files", where=str(path), remedy="They are named existence.txt ..."
        )
    items = _paired(unique((item for item, _ in pairs), path), path)
    texts = {item.id: text for item, text in pairs}
    return [(item, texts[item.id]) for item in items]


def _subtask_terms(outcomes: Sequence[Outcome], subtasks: Sequence[str]) -> Floats:
    """Right questions, questions, pictures with both right, pictures; for each subtask."""
    rows = np.zeros((len(outcomes), len(subtasks), 4))
    first: dict[str, int] = {}
    for number, outcome in enumerate(outcomes):
        if outcome.item.group in subtasks:
            subtask = subtasks.index(outcome.item.group)
            right = float(outcome.scored.score == 1)
            rows[number, subtask, :2] = right, 1
            place = first.setdefault(outcome.item.meta["picture"], number)
            if place == number:
                rows[number, subtask, 2:] = right, 1
            else:
                rows[place, subtask, 2] *= right
    return rows.reshape(len(outcomes), -1)


def _sum_of_scores(sums: Floats) -> Floats:
    parts = sums.reshape(*sums.shape[:-1], -1, 4)
    return np.asarray((100 * (share(parts[..., :2]) + share(parts[..., 2:]))).sum(-1))


def _sum_metric(name: str, subtasks: Sequence[str], *, best: float, divide: float = 1.0) -> Metric:
    return Metric(
        name=name,
        terms=lambda outcomes: _subtask_terms(outcomes, subtasks),
        combine=lambda sums: _sum_of_scores(sums) / divide if sums.shape[-1] else np.full(sums.shape[:-1], np.nan),
        scale=best,
        where=lambda outcome: outcome.item.group in subtasks,
    )


def _metrics(outcomes: Sequence[Outcome]) -> list[Metric]:
    """Sums are over the subtasks that are there: with fewer than 14 the result is a subset."""
    there = {outcome.item.group for outcome in outcomes}
    perception, cognition = ([name for name in names if name in there] for names in (PERCEPTION, COGNITION))
    metrics = [_sum_metric("perception", perception, best=2000), _sum_metric("cognition", cognition, best=800)]
    if len(there) == len(PERCEPTION + COGNITION):
        # As LibMoE quotes MME.
        metrics.append(_sum_metric("mean_of_28", perception + cognition, best=100, divide=28))
    return metrics + [_sum_metric(name, [name], best=200) for name in perception + cognition]


TASK = Task(
    name="mme",
    split="test",
    load=_load,
    score=_score,
    max_new_tokens=128,
    metrics=_metrics,
    read_predictions=_read,
    read_self_contained=_self_contained,
    counts={"MME": 2374},
)
