"""Scores a prediction file: items and predictions joined by key, outcomes, figures. No model, no images."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.item import EvaluationItem, Outcome, Scored
from symphony_vlm.evaluation.loading import whole_number
from symphony_vlm.evaluation.metrics import Metric, metric_values
from symphony_vlm.evaluation.rows import file_sha256
from symphony_vlm.evaluation.rules.letters import letters
from symphony_vlm.evaluation.task import Task

__all__ = ["OnUnparsed", "Score", "guess_unparsed", "outcomes_of", "parse_on_unparsed", "score_files"]

OnUnparsed = int | None
"""What becomes of a multiple choice answer that gives no letter: None counts it wrong, a number seeds a guess."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a prediction file is worth."""

    task: Task
    outcomes: tuple[Outcome, ...]
    values: Mapping[str, float | None]
    metrics: tuple[Metric, ...]
    on_unparsed: OnUnparsed = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Of each file or folder that was read, by its role."""
    notes: tuple[str, ...] = ()
    """About how the files were read."""

    @property
    def missing(self) -> list[str]:
        """Ids of the items without a prediction; they count as wrong."""
        return [outcome.item.id for outcome in self.outcomes if outcome.prediction is None]

    @property
    def n_unparsed(self) -> int:
        """Answers of which the rule made nothing, empty ones among them."""
        return sum(outcome.scored.status in ("unparsed", "empty", "ambiguous") for outcome in self.outcomes)

    @property
    def version(self) -> str | None:
        """The official version with this number of items."""
        return self.task.version([outcome.item for outcome in self.outcomes])

    @property
    def subset(self) -> bool:
        """Whether this is the score of a part of the benchmark, not the benchmark's score."""
        return bool(self.task.counts) and self.version is None

    @property
    def warnings(self) -> list[str]:
        """What the figures do not say by themselves."""
        found = list(self.notes)
        if self.subset:
            official = ", ".join(f"{name}: {n:,}" for name, n in self.task.counts.items())
            n = self.task.count([outcome.item for outcome in self.outcomes])
            found.append(f"a subset of {n:,}, not the benchmark's score (official: {official})")
        if self.missing:
            found.append(f"{len(self.missing):,} predictions are missing and count as wrong, first {self.missing[0]!r}")
        nulls = [name for name, value in self.values.items() if value is None]
        if nulls:
            found.append(f"nothing to divide by, so no value: {', '.join(nulls)}")
        return found

    def export(self) -> object:
        """The JSON document that the benchmark's server or judge takes.

        Raises:
            InputError: There is no such thing.
        """
        if self.task.export is None:
            raise InputError(
                f"{self.task.name} needs neither a server nor a judge, so there is nothing to export",
                where="--export",
                remedy="Leave it out.",
            )
        return self.task.export(self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        """The summary of ``--json``."""
        return {
            "task": self.task.name,
            "split": self.task.split,
            "metrics": dict(self.values),
            "n_items": len(self.outcomes),
            "n_unparsed": self.n_unparsed,
            "missing": len(self.missing),
            "subset": self.subset,
            "version": self.version,
            "on_unparsed": "wrong" if self.on_unparsed is None else f"random:{self.on_unparsed}",
            "warnings": self.warnings,
            "sha256": dict(self.sha256),
        }


def parse_on_unparsed(text: str) -> OnUnparsed:
    """``wrong`` or ``random:SEED``."""
    kind, _, seed = text.partition(":")
    if text == "wrong":
        return None
    number = whole_number(seed)
    if kind == "random" and number is not None:
        return number
    raise InputError(f"{text!r} must be wrong or random:SEED, for example random:42", where="--on-unparsed")


def score_files(
    task: Task,
    predictions: Path,
    *,
    annotations: Path | None = None,
    questions: Path | None = None,
    on_unparsed: OnUnparsed = None,
) -> Score:
    """Scores predictions.

    Args:
        task: The benchmark.
        predictions: In its official format or as LLaVA's answer lines.
        annotations: The official file or folder; None if the predictions hold the truth themselves.
        questions: LLaVA's question file, where answer lines alone do not identify the item; else it is not read, which
            is a warning.
        on_unparsed: See `OnUnparsed`.

    Raises:
        InputError: A file cannot be used, or an answer belongs to no item or to one that has another.
    """
    if not predictions.exists():
        raise InputError(
            "does not exist", where=f"--predictions {predictions}", remedy=f"Relative paths start at {Path.cwd()}."
        )
    unread = questions is not None and (annotations is None or task.read_with_questions is None)
    if unread:
        questions = None
    roles = {"predictions": predictions, "annotations": annotations, "questions": questions}
    return score_outcomes(
        task,
        outcomes_of(task, predictions, annotations=annotations, questions=questions),
        on_unparsed=on_unparsed,
        sha256={role: file_sha256(path) for role, path in roles.items() if path is not None and path.exists()},
        notes=(f"answers of {task.name} name their items: the question file was not read",) if unread else (),
    )


def score_outcomes(
    task: Task,
    outcomes: Sequence[Outcome],
    *,
    on_unparsed: OnUnparsed = None,
    sha256: Mapping[str, str] | None = None,
    notes: tuple[str, ...] = (),
) -> Score:
    """The figures of outcomes; `notes` join the warnings."""
    if on_unparsed is not None:
        outcomes = guess_unparsed(outcomes, seed=on_unparsed)
    metrics = task.metrics(outcomes)
    return Score(
        task=task,
        outcomes=tuple(outcomes),
        values=metric_values(metrics, outcomes),
        metrics=tuple(metrics),
        on_unparsed=on_unparsed,
        sha256=sha256 or {},
        notes=notes,
    )


def outcomes_of(
    task: Task, predictions: Path, *, annotations: Path | None, questions: Path | None = None
) -> list[Outcome]:
    """Every item with its prediction, or with none."""
    if annotations is None:
        if task.read_self_contained is None:
            raise InputError(
                f"predictions of {task.name} do not hold the right answers",
                where="--annotations",
                remedy="Give the benchmark's annotation file or folder.",
            )
        outcomes = [outcome(task, item, text) for item, text in task.read_self_contained(predictions)]
        if not outcomes:
            raise InputError("holds no answers", where=str(predictions))
        return outcomes
    items = task.load(annotations, None, annotations.parent, 0)
    if not items:
        raise InputError("holds no questions", where=str(annotations))
    if questions is None and task.read_results is not None:
        pairs = {item.id: (item, text) for item, text in task.read_results(predictions, items)}
        return [outcome(task, *pairs.get(item.id, (item, None))) for item in items]
    if questions is None or task.read_with_questions is None:
        found = task.read_predictions(predictions, items)
    else:
        found = task.read_with_questions(predictions, items, questions)
    return [outcome(task, item, found.get(item.id)) for item in items]


def outcome(task: Task, item: EvaluationItem, prediction: str | None) -> Outcome:
    """An item with its prediction scored; a missing one counts as wrong."""
    scored = Scored(score=0.0, parsed="", status="error") if prediction is None else task.score(prediction, item)
    return Outcome(item=item, prediction=prediction, scored=scored)


def guess_unparsed(outcomes: Sequence[Outcome], *, seed: int) -> list[Outcome]:
    """A random option for each multiple choice answer that gives none, as MMMU's script does with seed 42.

    One draw of ``random.choice`` per such answer, in the order of the outcomes. The status stays what it was.
    """
    rng = random.Random(seed)
    guessed = []
    for one in outcomes:
        if one.scored.status in ("unparsed", "empty", "ambiguous") and one.item.choices:
            letter = rng.choice(list(letters(len(one.item.choices))))
            right = float(letter == one.item.answers[0])
            one = replace(one, scored=replace(one.scored, parsed=letter, score=right))
        guessed.append(one)
    return guessed
