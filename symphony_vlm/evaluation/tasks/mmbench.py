"""MMBench dev (Liu et al. 2023, open-compass/MMBench): every question again with its options rotated.

A question counts in the circular score only if all its rotations are answered right; the vanilla score is that of the
unrotated rows alone. The two differ by ten points and more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from symphony_vlm.data.fields import shortened
from symphony_vlm.evaluation.item import EvaluationItem, Outcome
from symphony_vlm.evaluation.loading import key_of, needed, unique, whole_number
from symphony_vlm.evaluation.metrics import Metric, lenient_score, mean_of, share
from symphony_vlm.evaluation.rows import Row, read_rows
from symphony_vlm.evaluation.rules.letters import LETTER_INSTRUCTION, options_block, score_letter
from symphony_vlm.evaluation.statistics import Floats
from symphony_vlm.evaluation.task import Task

__all__ = ["TASKS"]

_ROTATION = 1_000_000
"""Rotated copies have the index of their question plus multiples of this."""
_INSTRUCTIONS = {"en": LETTER_INSTRUCTION, "cn": "\n请直接回答选项字母。"}
_LONGEST_INDEX = 16


def _load(
    data: Path | None, image_folder: Path | None, scratch: Path, seed: int, *, language: str = "en"
) -> Sequence[EvaluationItem]:
    data = needed(data, "mmbench_dev_20230712.tsv, or lmms-lab/MMBench")
    subset = language if data.as_posix() == "lmms-lab/MMBench" else None
    rows = read_rows(data, split="dev", subset=subset)
    instruction = _INSTRUCTIONS[language]
    by_index = {row.text("index"): row for row in rows}
    return unique((_item(row, by_index, image_folder, instruction) for row in rows), data)


def _item(row: Row, by_index: Mapping[str, Row], image_folder: Path | None, instruction: str) -> EvaluationItem:
    index = row.text("index")
    if whole_number(index) is None:
        raise row.error(f"the index is {shortened(index)}; it must be a number")
    choices = _options(row)
    answer = row.text("answer").strip()
    if answer not in tuple("ABCD"[: len(choices)]):
        raise row.error(
            f"the answer is {shortened(answer)} and there are {len(choices)} options",
            remedy="Answers of the test split are not public: use the dev split.",
        )
    hint = _given(row, "hint")
    question = "\n".join([*([hint] if hint else []), row.text("question"), options_block(choices)])
    category, l2_category = _given(row, "category"), _given(row, "l2-category", "L2-category", "l2_category")
    image = row.fields.get("image")
    # A copy's image may be the index of the row that has it.
    if isinstance(image, str) and len(image) <= _LONGEST_INDEX and image in by_index:
        row = by_index[image]
    images = row.images("image", folder=image_folder)
    return EvaluationItem(
        id=index,
        question=question + instruction,
        answers=(answer,),
        images=images,
        image_key=key_of(images, _question_of(index)),
        # Rotations are scored together, so they are resampled together even where their pictures differ as files.
        cluster=_question_of(index),
        group=category,
        choices=choices,
        asked=row.text("question"),
        meta={"l2_category": l2_category},
    )


def _options(row: Row) -> tuple[str, ...]:
    """The options A to D, up to the first that is missing."""
    options: list[str] = []
    for name in "ABCD":
        text = _given(row, name)
        if text is None:
            break
        options.append(text)
    if not options:
        raise row.error("has no option A")
    return tuple(options)


def _given(row: Row, *names: str) -> str | None:
    """A field's text; None where it is missing or spells nan or none, as tables write what is missing."""
    if all(row.fields.get(name) is None for name in names):
        return None
    text = row.text(*names)
    return None if text.strip().lower() in ("", "nan", "none") else text


def _question_of(index: str) -> str:
    return str(int(index) % _ROTATION)


def _circular(name: str, value: Callable[[Outcome], float], where: Callable[[Outcome], bool]) -> Metric:
    def terms(outcomes: Sequence[Outcome]) -> Floats:
        rows = np.zeros((len(outcomes), 2))
        first: dict[str, int] = {}
        for number, outcome in enumerate(outcomes):
            if where(outcome):
                place = first.setdefault(_question_of(outcome.item.id), number)
                rows[place] = (rows[place, 0] if rows[place, 1] else 1.0) * (value(outcome) == 1), 1.0
        return rows

    return Metric(name=name, terms=terms, combine=share, where=where)


def _is_vanilla(outcome: Outcome) -> bool:
    return int(outcome.item.id) < _ROTATION


def _score_of(outcome: Outcome) -> float:
    return outcome.scored.score


def _metrics(outcomes: Sequence[Outcome]) -> list[Metric]:
    def everywhere(outcome: Outcome) -> bool:
        return True

    metrics = [
        _circular("circular", _score_of, everywhere),
        mean_of("vanilla", where=_is_vanilla),
        _circular("circular_lenient", lenient_score, everywhere),
        mean_of("vanilla_lenient", lenient_score, where=_is_vanilla),
    ]
    readers: dict[str, Callable[[Outcome], str | None]] = {
        "": lambda outcome: outcome.item.group,
        "l2/": lambda outcome: outcome.item.meta["l2_category"],
    }
    for prefix, read in readers.items():
        for name in sorted({found for outcome in outcomes if (found := read(outcome)) is not None}):
            metrics.append(_circular(f"circular/{prefix}{name}", _score_of, partial(_belongs, read, name)))
            metrics.append(mean_of(f"vanilla/{prefix}{name}", where=partial(_belongs_vanilla, read, name)))
    return metrics


def _belongs(read: Callable[[Outcome], str | None], name: str, outcome: Outcome) -> bool:
    return read(outcome) == name


def _belongs_vanilla(read: Callable[[Outcome], str | None], name: str, outcome: Outcome) -> bool:
    return _is_vanilla(outcome) and read(outcome) == name


def _task(name: str, language: str) -> Task:
    return Task(
        name=name,
        split="dev",
        load=partial(_load, language=language),
        score=score_letter,
        max_new_tokens=1024,
        metrics=_metrics,
        counts={"mmbench_dev_20230712": 1176, "later dev files": 1164},
        count=lambda items: len({_question_of(item.id) for item in items}),
    )


TASKS = (_task("mmbench", "en"), _task("mmbench_cn", "cn"))
