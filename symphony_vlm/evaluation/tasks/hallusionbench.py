"""HallusionBench (Guan et al. 2023, tianyi-lab/HallusionBench): yes-no questions about pictures and edited pictures.

Official scores come from a judge, who labels an answer right (1), wrong (0) or unclear (2); judgements are imported.
Without them an answer is unclear if it holds neither or both of yes and no.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from symphony_vlm.data.fields import shortened
from symphony_vlm.evaluation.item import EvaluationItem, Outcome, Scored
from symphony_vlm.evaluation.loading import key_of, needed, unique
from symphony_vlm.evaluation.metrics import Metric, group_accuracies, mean_of, share
from symphony_vlm.evaluation.predictions import ID_FIELDS, TEXT_FIELDS, read_answers_by
from symphony_vlm.evaluation.rows import Row, read_rows
from symphony_vlm.evaluation.rules.yes_no import only_yes_or_no
from symphony_vlm.evaluation.statistics import Floats
from symphony_vlm.evaluation.task import Task

__all__ = ["TASK"]

_PLACE = ("category", "subcategory", "set_id", "figure_id", "question_id")
_JUDGEMENT = ("gpt4v_output_gpt_check", "judgement", "correct")
"""Where results have the judge's label, the first that is there."""


def _load(data: Path | None, image_folder: Path | None, scratch: Path, seed: int) -> Sequence[EvaluationItem]:
    data = needed(data, "HallusionBench.json or lmms-lab/HallusionBench")
    rows = read_rows(data, split="image")
    folder = image_folder or (data.parent if data.is_file() else data)
    return unique((_item(row, folder) for row in rows), data)


def _item(row: Row, folder: Path | None) -> EvaluationItem:
    place = {name: row.text(name) for name in _PLACE}
    truth, visual = row.text("gt_answer"), row.text("visual_input")
    if truth not in ("0", "1") or visual not in ("0", "1", "2"):
        raise row.error(
            f"gt_answer is {shortened(truth)} and visual_input {shortened(visual)}; they must be 0 or 1, and 0, 1 or 2"
        )
    # The file names a picture even where the question is asked without one.
    images = row.images("image", "filename", folder=folder) if visual != "0" else ()
    item_id = "/".join(place.values())
    return EvaluationItem(
        id=item_id,
        question=row.text("question"),
        answers=("yes" if truth == "1" else "no",),
        images=images,
        image_key=key_of(images, item_id),
        # Questions about the pictures of one set are scored together.
        cluster=f"{place['category']}/{place['subcategory']}/{place['set_id']}",
        group=f"{place['category']}/{place['subcategory']}",
        meta={**place, "visual_input": visual, "label": _label(row)},
    )


def _label(row: Row) -> str | None:
    given = [name for name in _JUDGEMENT if row.fields.get(name) is not None]
    if not given:
        return None
    label = row.text(given[0]).strip()
    if label not in ("0", "1", "2"):
        raise row.error(f"field {given[0]!r} is {shortened(label)}; it must be 0 (wrong), 1 (right) or 2 (unclear)")
    return label


def _score(prediction: str, item: EvaluationItem) -> Scored:
    label = item.meta["label"]
    said = only_yes_or_no(prediction)
    if label is None:
        label = "2" if said is None else "1" if said == item.answers[0] else "0"
    # Without a picture to look at, not knowing is right.
    right = label == "1" or (label == "2" and item.meta["category"] == "VS" and item.meta["figure_id"] == "0")
    return Scored(
        score=float(right),
        parsed=said or "",
        status="empty" if not prediction.strip() else "unparsed" if label == "2" else "ok",
    )


def _read(path: Path, items: Sequence[EvaluationItem]) -> dict[str, str]:
    def key(row: Row) -> str:
        return "/".join(row.text(name) for name in _PLACE) if set(_PLACE) <= set(row.fields) else row.text(*ID_FIELDS)

    return read_answers_by(key, path, items, text_fields=("model_prediction", *TEXT_FIELDS))


def _self_contained(path: Path) -> list[tuple[EvaluationItem, str]]:
    """Official results: the data's rows with ``model_prediction`` and, once judged, the judge's label."""
    rows = read_rows(path)
    items = unique((_item(row, None) for row in rows), path)
    return [(item, row.text("model_prediction")) for item, row in zip(items, rows, strict=True)]


def _all_right(name: str, by: str, where: Callable[[Outcome], bool] = lambda outcome: True) -> Metric:
    """The share of groups (category, subcategory, set, ``by``) of which everything is right."""

    def terms(outcomes: Sequence[Outcome]) -> Floats:
        rows = np.zeros((len(outcomes), 2))
        first: dict[tuple[str, ...], int] = {}
        for number, outcome in enumerate(outcomes):
            if where(outcome):
                meta = outcome.item.meta
                group = (meta["category"], meta["subcategory"], meta["set_id"], meta[by])
                place = first.setdefault(group, number)
                rows[place] = (rows[place, 0] if rows[place, 1] else 1.0) * outcome.scored.score, 1.0
        return rows

    return Metric(name=name, terms=terms, combine=share, where=where)


def _has_figure(outcome: Outcome) -> bool:
    return not (outcome.item.meta["category"] == "VS" and outcome.item.meta["figure_id"] == "0")


def _is_hard(outcome: Outcome) -> bool:
    return bool(outcome.item.meta["visual_input"] == "2")


def _yes_bias(outcome: Outcome) -> float:
    """Predicted yes (a right answer says the truth, a wrong one the opposite) minus true yes."""
    truth = outcome.item.answers[0] == "yes"
    return float((outcome.scored.score == 1) == truth) - float(truth)


def _error_on_no(outcome: Outcome) -> float | None:
    return None if outcome.scored.score == 1 else float(outcome.item.answers[0] == "no")


def _metrics(outcomes: Sequence[Outcome]) -> list[Metric]:
    return [
        mean_of("aAcc"),
        _all_right("qAcc", "question_id"),
        _all_right("fAcc", "figure_id", _has_figure),
        _all_right("easy", "question_id", lambda outcome: not _is_hard(outcome)),
        _all_right("hard", "question_id", _is_hard),
        mean_of("yes_bias", _yes_bias, higher_is_better=False),
        mean_of("no_share_of_errors", _error_on_no, higher_is_better=False),
        *group_accuracies(outcomes, prefix="aAcc"),
    ]


TASK = Task(
    name="hallusionbench",
    split="test",
    load=_load,
    score=_score,
    metrics=_metrics,
    read_predictions=_read,
    read_self_contained=_self_contained,
    max_new_tokens=128,
    counts={"all": 1129, "with an image": 951},
)
