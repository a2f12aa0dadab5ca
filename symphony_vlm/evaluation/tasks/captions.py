"""Captions with one or more references: CIDEr and BLEU-4 (`rules/captions.py` says how texts become tokens).

Files: COCO's captions (``{images: [{id, file_name}], annotations: [{image_id, caption}]}``), or any data set that
``short_answer`` reads, whose answers are the references. Predictions: COCO's results (``[{image_id, caption}]``),
LLaVA's answer lines, or our records. A single item's score is its sentence BLEU, since CIDEr is a figure of a corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.benchmark_files import picture
from symphony_vlm.evaluation.loading import needed, unique
from symphony_vlm.evaluation.metrics import Metric, Outcome, mean_of
from symphony_vlm.evaluation.predictions import ID_FIELDS, TEXT_FIELDS, answer_text, join_answers
from symphony_vlm.evaluation.rows import Row, read_json, read_rows
from symphony_vlm.evaluation.rules.captions import bleu, bleu_statistics, check_libraries, cider, sentence_bleu
from symphony_vlm.evaluation.statistics import Floats
from symphony_vlm.evaluation.task import EvaluationItem, Scored, Task
from symphony_vlm.evaluation.tasks.short_answer import load_items

__all__ = ["TASK"]

_PROMPT = "Provide a one-sentence caption for the provided image."
"""LLaVA's for caption data."""


def _load(data: Path | None, image_folder: Path | None, scratch: Path, seed: int) -> Sequence[EvaluationItem]:
    data = needed(data, "COCO's captions file, LLaVA JSON, JSONL or parquet")
    is_coco = data.is_file() and data.suffix == ".json" and isinstance(read_json(data), dict)
    items = _coco_items(data, image_folder) if is_coco else load_items(data, image_folder)
    check_libraries()
    return items


def _coco_items(data: Path, image_folder: Path | None) -> list[EvaluationItem]:
    references: dict[str, list[str]] = {}
    for row in read_rows(data, inside=("annotations",)):
        references.setdefault(row.text("image_id"), []).append(row.text("caption"))
    items = []
    for row in read_rows(data, inside=("images",)):
        name = row.text("id")
        images, key = picture(row, data, image_folder, "file_name")
        if name not in references:
            raise row.error(f"the picture {name} has no caption", remedy="Give every picture an annotation.")
        items.append(
            EvaluationItem(id=name, question=_PROMPT, answers=tuple(references[name]), images=images, image_key=key)
        )
    items = unique(items, data)
    if strange := sorted(references.keys() - {item.id for item in items}):
        raise InputError(f"the annotation's image_id {strange[0]} is no picture of the file", where=str(data))
    return items


def score(prediction: str, item: EvaluationItem) -> Scored:
    """Sentence BLEU, 0 to 1."""
    text = prediction.strip()
    if not text:
        return Scored(score=0.0, parsed="", status="empty")
    return Scored(score=min(1.0, sentence_bleu(text, item.answers) / 100), parsed=text)


def _read(path: Path, items: Sequence[EvaluationItem]) -> dict[str, str]:
    rows = read_rows(path, as_pairs=("image_id", "caption"))
    return join_answers(
        ((row, row.text("image_id", *ID_FIELDS), text) for row in rows if (text := _caption(row)) is not None), items
    )


def _caption(row: Row) -> str | None:
    return answer_text(row, ("caption", *TEXT_FIELDS))


def _cider_terms(outcomes: Sequence[Outcome]) -> Floats:
    scores = cider([outcome.prediction or "" for outcome in outcomes], [outcome.item.answers for outcome in outcomes])
    return np.stack([scores, np.ones(len(outcomes))], axis=1)


def _bleu_terms(outcomes: Sequence[Outcome]) -> Floats:
    return np.stack([bleu_statistics(outcome.prediction or "", outcome.item.answers) for outcome in outcomes])


def _mean(sums: Floats) -> Floats:
    mean: Floats = sums[..., 0] / sums[..., 1]
    return mean


def _metrics(outcomes: Sequence[Outcome]) -> list[Metric]:
    return [
        Metric(name="cider", terms=_cider_terms, combine=_mean, scale=10.0),
        Metric(name="bleu", terms=_bleu_terms, combine=bleu, scale=100.0),
        mean_of("sentence_bleu"),
    ]


TASK = Task(
    name="captions",
    split="data",
    load=_load,
    score=score,
    max_new_tokens=64,
    metrics=_metrics,
    read_predictions=_read,
)
