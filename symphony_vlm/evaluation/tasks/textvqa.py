"""TextVQA 0.5.1, validation: questions about text in pictures (Singh et al., arXiv 1904.08920; facebookresearch/mmf).

Files: ``TextVQA_0.5.1_val.json`` (``{data: [{image_id, question, question_id, answers}]}``), alone or in a folder with
``TextVQA_Rosetta_OCR*.json`` (``{data: [{image_id, ocr_tokens}]}``) or LLaVA's ``llava_textvqa_val_v051_ocr.jsonl``; or
lmms-lab/textvqa, whose rows have the tokens.
Predictions: LLaVA's answer lines, whose ``question_id`` is the image's id and whose question stands in the prompt; or
``question_id`` of the annotations with ``answer``. Rule: `rules/vqa.py`, variant ``evalai``.

LLaVA-1.5 puts OCR tokens into the prompt, which is worth some twelve points. ``textvqa`` does so where the data have
tokens, ``textvqa_no_ocr`` never does, and a figure beside the accuracy says what it was.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from symphony_vlm.evaluation.benchmark_files import (
    asked_question,
    find_file,
    join_by_key,
    picture,
    short_prompt,
)
from symphony_vlm.evaluation.judgements import known_score, not_judged
from symphony_vlm.evaluation.loading import needed, unique
from symphony_vlm.evaluation.metrics import Metric, Outcome, mean_of
from symphony_vlm.evaluation.predictions import ID_FIELDS, answer_text
from symphony_vlm.evaluation.rows import Row, read_rows
from symphony_vlm.evaluation.rules.vqa import normalize, ten_answers, vqa_score
from symphony_vlm.evaluation.task import EvaluationItem, Scored, Task
from symphony_vlm.evaluation.typed_fields import texts

__all__ = ["TASKS"]


_OCR = "Reference OCR token:"


def _load(data: Path | None, image_folder: Path | None, scratch: Path, seed: int) -> Sequence[EvaluationItem]:
    return load_items(data, image_folder, use_ocr=True)


def _load_without_ocr(
    data: Path | None, image_folder: Path | None, scratch: Path, seed: int
) -> Sequence[EvaluationItem]:
    return load_items(data, image_folder, use_ocr=False)


def load_items(data: Path | None, image_folder: Path | None, *, use_ocr: bool) -> list[EvaluationItem]:
    """The questions, with OCR tokens in the prompt where there are any and they are wanted."""
    data = needed(data, "TextVQA_0.5.1_val.json, its folder, or lmms-lab/textvqa")
    rows = _rows(data)
    tokens = _ocr_tokens(data) if use_ocr else {}
    prompts = _llava_prompts(data) if use_ocr else {}
    items = []
    for row in rows:
        image_id = row.text("image_id")
        ocr = None
        if use_ocr:
            ocr = texts(row, "ocr_tokens") if "ocr_tokens" in row.fields else tokens.get(image_id)
        images, key = picture(row, data, image_folder, "image", name=f"{image_id}.jpg")
        question = row.text("question")
        shown = short_prompt(question if ocr is None else f"{question}\nReference OCR token: {', '.join(ocr)}")
        shown = prompts.get((image_id, asked_question(question)), shown)
        items.append(
            EvaluationItem(
                id=row.text("question_id"),
                question=shown,
                answers=ten_answers(row),
                images=images,
                image_key=key,
                meta={"image_id": image_id, "asked": asked_question(question), "with_ocr": _OCR in shown},
            )
        )
    return unique(items, data)


def _rows(data: Path) -> list[Row]:
    file = find_file(data, "TextVQA_0*_val.json") if data.is_dir() else None
    return read_rows(file or data, inside=("data",), split="validation" if not (file or data).is_file() else None)


def _ocr_tokens(data: Path) -> Mapping[str, Sequence[str]]:
    file = find_file(data, "TextVQA_Rosetta_OCR*_val.json", "TextVQA_Rosetta_OCR*.json") if data.is_dir() else None
    if file is None:
        return {}
    return {row.text("image_id"): texts(row, "ocr_tokens") for row in read_rows(file, inside=("data",))}


def _llava_prompts(data: Path) -> dict[tuple[str, str], str]:
    """LLaVA's prompts by picture and question."""
    file = find_file(data, "llava_textvqa*ocr.jsonl") if data.is_dir() else None
    rows = read_rows(file) if file else []
    return {(row.text("question_id"), asked_question(row.text("text"))): row.text("text") for row in rows}


def score(prediction: str, item: EvaluationItem) -> Scored:
    """VQA accuracy after the ``evalai`` normaliser."""
    if not item.answers:
        return not_judged(prediction)
    return vqa_score(prediction, normalize(prediction), [normalize(answer) for answer in item.answers])


def read_results(path: Path, items: Sequence[EvaluationItem]) -> list[tuple[EvaluationItem, str]]:
    """Answers, and whether the prompts that came with them had OCR tokens (None: the file has no prompts)."""
    rows = read_rows(path, as_pairs=("question_id", "text"))
    by_question: dict[Hashable, list[str]] = {}
    for item in items:
        by_question.setdefault((item.meta["image_id"], item.meta["asked"]), []).append(item.id)
    by_id: dict[Hashable, list[str]] = {item.id: [item.id] for item in items}
    asked = [_prompt(row) for row in rows]
    answers = [
        (row, row.text(*ID_FIELDS) if prompt is None else (row.text(*ID_FIELDS), asked_question(prompt)), text)
        for row, prompt in zip(rows, asked, strict=True)
        for text in (answer_text(row),)
    ]
    found = join_by_key(answers, {**by_question, **by_id})
    prompts = [prompt for prompt in asked if prompt is not None]
    with_ocr = any(_OCR in prompt for prompt in prompts) if prompts else None
    return [
        (replace(item, meta={**item.meta, "with_ocr": with_ocr}), found[item.id]) for item in items if item.id in found
    ]


def _prompt(row: Row) -> str | None:
    prompt = row.fields.get("prompt")
    return prompt if isinstance(prompt, str) else None


def _metrics(outcomes: Sequence[Outcome]) -> list[Metric]:
    known = {outcome.item.meta.get("with_ocr") for outcome in outcomes if outcome.prediction is not None}
    # Missing outcomes come from the annotations and know nothing of the prompts that were used.
    told = known.pop() if len(known) == 1 else None
    names = {True: "accuracy/with_ocr", False: "accuracy/without_ocr", None: "accuracy/ocr_unknown"}
    return [mean_of("accuracy", known_score), mean_of(names[told], known_score)]


def _task(name: str, *, use_ocr: bool) -> Task:
    return Task(
        name=name,
        split="val",
        load=_load if use_ocr else _load_without_ocr,
        score=score,
        max_new_tokens=128,
        metrics=_metrics,
        read_results=read_results,
        counts={"0.5.1 val": 5000, "0.5.1 test": 5734},
    )


TASKS = (_task("textvqa", use_ocr=True), _task("textvqa_no_ocr", use_ocr=False))
