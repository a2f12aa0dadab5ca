"""Several models in one evaluation: a folder each, as if alone, and one report."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.plan import EvaluationPlan
from symphony_vlm.evaluation.processes import Processes
from symphony_vlm.evaluation.runner import EvaluationSummary, evaluate_together

__all__ = ["SweepSummary", "evaluate_models", "model_labels"]

_SAYS_NOTHING = ("model", ".", "..")
"""Last parts of paths that tell no models apart."""


@dataclass(frozen=True, kw_only=True)
class SweepSummary:
    """What `evaluate_models` has written."""

    folders: tuple[Path, ...]
    summaries: tuple[EvaluationSummary, ...]

    @property
    def num_errors(self) -> int:
        """Items that failed, over all models."""
        return sum(summary.num_errors for summary in self.summaries)

    @property
    def errors(self) -> Counter[str]:
        """Items that failed, by the exception's name; empty in processes other than the first."""
        return sum((Counter(summary.errors) for summary in self.summaries), Counter())

    @property
    def headline(self) -> dict[str, dict[str, float | None]]:
        """Headline figures by model and cell."""
        return {folder.name: one.headline for folder, one in zip(self.folders, self.summaries, strict=True)}

    def to_dict(self, results: Path) -> dict[str, Any]:
        """The summary of ``--json``; ``results`` is the report's file of all models."""
        evaluations = {folder.name: str(folder / "results.json") for folder in self.folders}
        return {
            "results": str(results),
            "evaluations": evaluations,
            "headline": self.headline,
            "n_errors": self.num_errors,
        }


def evaluate_models(
    plan: EvaluationPlan,
    models: Sequence[str],
    output: Path,
    *,
    console: Console | None = None,
    processes: Processes | None = None,
) -> SweepSummary:
    """Evaluates several models on the same pictures, each opened, corrupted and, where towers are equal, encoded once.

    Args:
        plan: what to do; its model is not looked at.
        models: folders of models or finished runs, or hub names.
        output: gets a complete evaluation folder for each model, named by `model_labels`.
        console: where progress goes; default: standard error.
        processes: who takes part; default: the processes of the launch.

    Raises:
        InputError: a model is given twice, the folder holds the evaluation of one model, or as of `runner.evaluate`.
    """
    if (output / "manifest.json").is_file():
        raise InputError(
            "the folder holds the evaluation of one model, whose results those of several would replace",
            where=str(output),
            remedy="Give another --output.",
        )
    folders = [output / label for label in model_labels(models)]
    plans = [dataclasses.replace(plan, model=model) for model in models]
    summaries = evaluate_together(plans, folders, scratch=output, console=console, processes=processes)
    return SweepSummary(folders=tuple(folders), summaries=tuple(summaries))


def model_labels(models: Sequence[str]) -> list[str]:
    """Short names that can be folders: of each path the last part that is not ``model``, with as many before as needed.

    Raises:
        InputError: two models are the same, or no short names tell them apart.
    """
    parts = [_parts(model) for model in models]
    for index, (model, own) in enumerate(zip(models, parts, strict=True)):
        if own in parts[:index]:
            raise InputError("the model is given twice", where=f"--model {model}", remedy="Give each model once.")
    labels = []
    for own in parts:
        others = [other for other in parts if other != own]
        length = next(n for n in range(1, len(own) + 2) if all(own[-n:] != other[-n:] for other in others))
        label = "-".join(own[-length:])
        if label in labels:
            raise InputError(f"two models would write to the folder {label!r}", where="--model", remedy="Rename one.")
        labels.append(label)
    return labels


def _parts(model: str) -> tuple[str, ...]:
    # Links are not followed: the finished model of a run is one, to its last stage.
    path = Path(model)
    path = path.absolute() if path.exists() else path
    found = [part for part in path.parts if part != path.anchor]
    while len(found) > 1 and found[-1] in _SAYS_NOTHING:
        found.pop()
    return tuple(found)
