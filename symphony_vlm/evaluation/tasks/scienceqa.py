"""ScienceQA (Lu et al. 2022, lupantech/ScienceQA), test: about half of the questions have a picture."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from symphony_vlm.data.fields import shortened
from symphony_vlm.data.sample import ImageRef
from symphony_vlm.evaluation.item import EvaluationItem, Outcome, Scored
from symphony_vlm.evaluation.loading import key_of, needed, unique
from symphony_vlm.evaluation.metrics import Metric, group_accuracies, lenient_score, mean_of
from symphony_vlm.evaluation.rows import Row, read_json, read_rows
from symphony_vlm.evaluation.rules.letters import (
    LETTER_INSTRUCTION,
    lenient_letter,
    letters,
    options_block,
)
from symphony_vlm.evaluation.task import Task

__all__ = ["TASK"]

_LETTERS = "ABCDE"
_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")


def _load(data: Path | None, image_folder: Path | None, scratch: Path, seed: int) -> Sequence[EvaluationItem]:
    data = needed(data, "problems.json, the folder with it and pid_splits.json, or lmms-lab/ScienceQA")
    problems = data / "problems.json" if data.is_dir() else data
    if problems.is_file() and problems.suffix == ".json":
        rows = list(_test_problems(problems))
    else:
        rows = read_rows(data, split="test", subset=_subset(data))
        # The hub's table has no ids: the number of the row is one.
        rows = [Row({"id": str(number), **row.fields}, row.where) for number, row in enumerate(rows)]
    return unique((_item(row, image_folder) for row in rows), data)


def _subset(data: Path) -> str | None:
    return None if data.exists() else "ScienceQA-FULL"


def _test_problems(path: Path) -> Iterator[Row]:
    """The test split, by pid_splits.json beside the problems, else by each problem's own field, else all."""
    rows = read_rows(path, as_pairs=("id", "problem"))
    splits = path.with_name("pid_splits.json")
    if splits.is_file():
        by_id = {row.text("id"): row for row in rows}
        listed = read_json(splits)
        test = listed.get("test") if isinstance(listed, dict) else None
        if not isinstance(test, list):
            raise Row({}, splits.name).error("must be an object with a list under 'test'")
        for pid in map(str, test):
            # A file of some problems only is a subset, which the number of items tells.
            if pid in by_id:
                yield by_id[pid]
    else:
        yield from (row for row in rows if row.fields.get("split", "test") == "test")


def _item(row: Row, image_folder: Path | None) -> EvaluationItem:
    pid, choices = row.text("id"), _choices(row)
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise row.error(f"the answer is {shortened(answer)}; it must be the index of one of {len(choices)} choices")
    hint = row.fields.get("hint")
    context = f"Context: {hint}\n" if hint else ""
    image = row.fields.get("image")
    images: tuple[ImageRef, ...] = ()
    if isinstance(image, str) and image:
        images = (ImageRef(path=(image_folder or Path()) / pid / image, name=f"{pid}/{image}"),)
    elif image:
        images = row.images("image", folder=image_folder)
    return EvaluationItem(
        id=pid,
        question=f"{context}{row.text('question')}\n{options_block(choices)}{LETTER_INSTRUCTION}",
        answers=(letters(len(choices))[answer],),
        images=images,
        image_key=key_of(images, pid),
        group=row.text("subject") if row.fields.get("subject") else None,
        choices=choices,
        asked=row.text("question"),
    )


def _choices(row: Row) -> tuple[str, ...]:
    choices: Any = row.get("choices")
    if not isinstance(choices, list) or not 1 <= len(choices) <= len(_LETTERS):
        raise row.error(f"field 'choices' is {shortened(choices)}; it must be a list of one to five texts")
    return tuple(map(str, choices))


def _letter(text: str) -> str | None:
    """LLaVA's rule."""
    if text in tuple(_LETTERS):
        return text
    if text[:1] in tuple(_LETTERS) and text[1:3] == ". ":
        return text[0]
    found = _ANSWER_IS.findall(text)
    return str(found[0]) if len(found) == 1 else None


def _score(prediction: str, item: EvaluationItem) -> Scored:
    if not prediction.strip():
        return Scored(score=0.0, parsed="", status="empty", lenient=0.0)
    letter = _letter(prediction)
    lenient = float(lenient_letter(prediction, item.choices) == item.answers[0])
    if letter is None or letter not in letters(len(item.choices)):
        return Scored(score=0.0, parsed="", status="unparsed", lenient=lenient)
    right = float(letter == item.answers[0])
    # Forgiving means no less than the official rule.
    return Scored(score=right, parsed=letter, lenient=max(right, lenient))


def _has_image(outcome: Outcome) -> bool:
    return bool(outcome.item.images)


def _metrics(outcomes: Sequence[Outcome]) -> list[Metric]:
    return [
        mean_of("accuracy"),
        mean_of("accuracy_image", where=_has_image),
        mean_of("accuracy_lenient", lenient_score),
        mean_of("accuracy_image_lenient", lenient_score, where=_has_image),
        *group_accuracies(outcomes),
    ]


TASK = Task(
    name="scienceqa",
    split="test",
    load=_load,
    score=_score,
    max_new_tokens=1024,
    metrics=_metrics,
    counts={"test": 4241, "test with an image": 2017},
)
