"""A few questions whose answers flip under corruption, chosen by rule and not by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from symphony_vlm.evaluation.flip_pictures import PicturePair, find_pictures
from symphony_vlm.evaluation.item_finder import ItemFinder
from symphony_vlm.evaluation.report_data import ModelInfo, ReportData, read_lines
from symphony_vlm.evaluation.robustness import CLEAN, Cell, ModelScores, corrupted_cells

__all__ = ["FlippedSample", "SampleChoice", "choose_samples"]


@dataclass(frozen=True, kw_only=True)
class FlippedSample:
    """One question under one corruption, with what every model said."""

    task: str
    cell: Cell
    item_id: str
    question: str
    answer: str
    said: tuple[tuple[str, str, str, bool, bool], ...]
    """Per model: label, clean prediction, corrupted prediction, right clean, right corrupted."""
    pictures: PicturePair | str = "pictures were not asked for"
    """What the models were shown, or why it cannot be shown here."""


@dataclass(frozen=True, kw_only=True)
class SampleChoice:
    """The samples of one kind of flip and how many there were to choose from."""

    title: str
    total: int
    samples: tuple[FlippedSample, ...]


def choose_samples(data: ReportData, *, per_kind: int = 4, finder: ItemFinder | None = None) -> list[SampleChoice]:
    """Flips that one model suffers and the other does not, equally many each way.

    Among all (item, corrupted cell) pairs of a kind, those with the smallest sha256 of their names are shown: a choice
    that depends on no model's answers. With a single model: its right-to-wrong flips. Samples bring their pictures if
    ``finder`` finds them.
    """
    choices: list[SampleChoice] = []
    for task in dict.fromkeys(scores.task for scores in data.scores):
        models = [s for s in data.scores if s.task == task and CLEAN in s.records]
        if len(models) == 1:
            title = f"{task}: right on the clean picture, wrong on the corrupted one"
            choices.append(_choice(data, title, models, _lost(models[0], None), per_kind, finder))
        for other in models[1:]:
            for loser, keeper in ((models[0], other), (other, models[0])):
                title = f"{task}: {loser.label} flips to wrong, {keeper.label} stays right"
                lost = _lost(loser, keeper)
                choices.append(_choice(data, title, [models[0], other], lost, per_kind, finder))
    return [choice for choice in choices if choice.total]


def _lost(loser: ModelScores, keeper: ModelScores | None) -> list[tuple[str, Cell]]:
    """(item, cell) pairs right when clean and wrong when corrupted for ``loser``, right both times for ``keeper``."""
    right = {id(m): {cell: _right(m, cell) for cell in m.records} for m in (loser, keeper) if m is not None}
    found: list[tuple[str, Cell]] = []
    for cell in corrupted_cells(loser.records):
        mine = right[id(loser)]
        lost = {item for item, ok in mine[cell].items() if ok is False and mine[CLEAN].get(item)}
        if keeper is not None:
            kept = right[id(keeper)]
            lost = {item for item in lost if kept[CLEAN].get(item) and kept.get(cell, {}).get(item)}
        found.extend((item, cell) for item in lost)
    return found


def _right(scores: ModelScores, cell: Cell) -> dict[str, bool | None]:
    records = scores.records[cell]
    pairs = zip(records.item_ids, records.scores, strict=True)
    return {item: None if np.isnan(score) else bool(score >= 0.5) for item, score in pairs}


def _choice(
    data: ReportData,
    title: str,
    models: Sequence[ModelScores],
    found: Sequence[tuple[str, Cell]],
    per_kind: int,
    finder: ItemFinder | None,
) -> SampleChoice:
    def key(pair: tuple[str, Cell]) -> str:
        return hashlib.sha256(f"{pair[0]}\n{pair[1]}".encode()).hexdigest()

    chosen: list[tuple[str, Cell]] = []
    for item, cell in sorted(found, key=key):
        # Different questions under different corruptions show more than one question five times over.
        if len(chosen) < per_kind and item not in {i for i, _ in chosen}:
            chosen.append((item, cell))
    owners = [next(m for m in data.models if m.label == s.label) for s in models]
    texts = [_texts(owner, s.task, chosen) for owner, s in zip(owners, models, strict=True)]
    samples: list[FlippedSample] = []
    for item, cell in chosen:
        first = texts[0].get((item, CLEAN), {})
        said = tuple(_said(s.label, text, item, cell) for s, text in zip(models, texts, strict=True))
        question, answer = str(first.get("question", "")), str(first.get("answer", ""))
        sample = FlippedSample(
            task=models[0].task, cell=cell, item_id=item, question=question, answer=answer, said=said
        )
        if finder is not None:
            bad = texts[0].get((item, cell), {})
            sample = replace(sample, pictures=find_pictures(finder, owners[0].evaluations, first, bad))
        samples.append(sample)
    return SampleChoice(title=title, total=len(found), samples=tuple(samples))


def _texts(model: ModelInfo, task: str, chosen: Sequence[tuple[str, Cell]]) -> dict[tuple[str, Cell], dict[str, Any]]:
    wanted = {*chosen, *((item, CLEAN) for item, _ in chosen)}
    found: dict[tuple[str, Cell], dict[str, Any]] = {}
    for evaluation in model.evaluations:
        for (name, cell), path in evaluation.files.items():
            items = {item for item, other in wanted if other == cell}
            if items and name == task.split("/")[0]:
                for record in read_lines(path):
                    if str(record["item_id"]) in items:
                        found[str(record["item_id"]), cell] = record
    return found


def _said(
    label: str, texts: Mapping[tuple[str, Cell], dict[str, Any]], item: str, cell: Cell
) -> tuple[str, str, str, bool, bool]:
    clean, bad = texts.get((item, CLEAN), {}), texts.get((item, cell), {})
    return (label, _text(clean), _text(bad), (clean.get("score") or 0) >= 0.5, (bad.get("score") or 0) >= 0.5)


def _text(record: Mapping[str, Any]) -> str:
    return str(record.get("prediction") or "").strip() or "(empty)"
