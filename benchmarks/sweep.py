"""A sweep of corruptions over two models: each alone, and both together, as ``eval`` does with several ``--model``.

Together, each picture is opened, corrupted and encoded once for both; alone, twice. The answers must be equal, token
for token. As many clean cells, each model alone, give the scale: a sweep over all corruptions and severities is 96
cells, of which one is clean. Corruptions are taken at severity 3; ``frost`` is its procedural variant, which needs no
texture files.

The models are two of the recipe ``instruct_small`` with random weights, equal but for the language model. Questions are
those of generated scenes, eight a picture, with answers of one token: the case in which looking costs most.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.evaluate import answers_as_numbers, random_model
from benchmarks.measure import Case, Plan, Result
from symphony_vlm.corruptions import ALL
from symphony_vlm.data.scenes import generate_scenes
from symphony_vlm.evaluation.cell import Respondent, run_cell_together
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.predictor import Predictor
from symphony_vlm.evaluation.sharing import SharedEncoder
from symphony_vlm.evaluation.task import get_task

__all__ = ["PLAN", "cases", "summary"]

PLAN = Plan(rounds=1, alternations=5, seconds=0.0)

BATCH_SIZE = 64
CELLS = 1 + 19 * 5
CLEAN = "clean, each alone"


def cases(*, tiny: bool, device: torch.device) -> Iterator[Case]:
    """A cell of each corruption, beside as many clean ones.

    Args:
        tiny: sizes for a test of the benchmark.
        device: where the models are.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scenes = generate_scenes(folder / "scenes", train=8, test=1 if tiny else 8)
        first = random_model("tiny" if tiny else "instruct_small", scenes.train_json, folder).to(device).eval()
        second = copy.deepcopy(first)
        second.processor = first.processor
        with torch.no_grad():
            for weight in second.language_model.parameters():
                weight += 0.1 * torch.randn_like(weight) * weight.std(correction=0)
        items = list(get_task("scenes").load(folder / "scenes", None, folder, 0))
        names = ["frost_procedural" if name == "frost" else name for name in ALL][: 2 if tiny else None]
        cells, clean = (
            [Cell(task=get_task("scenes"), corruption=name, severity=severity, seed=0) for name in chosen]
            for chosen, severity in ((names, 3), (["none"] * len(names), 0))
        )
        yield Case(
            settings={"cells": len(cells), "questions a cell": len(items)},
            references={CLEAN: _sweep([[first], [second]], clean, items, folder)},
            contenders={
                "each alone": _sweep([[first], [second]], cells, items, folder),
                "together": _sweep([[first, second]], cells, items, folder),
            },
            items=("questions", 2 * len(cells) * len(items)),
        )


def summary(results: Sequence[tuple[Case, Result]]) -> str:
    """What the whole sweep costs, in clean passes of each model alone."""
    ((case, result),) = results
    clean = result.timings[CLEAN].seconds
    passes = {name: 1 + (CELLS - 1) * result.timings[name].seconds / clean for name in case.contenders}
    return "\n".join(f"{name}: {CELLS} cells cost {number:.1f} clean passes" for name, number in passes.items())


def _sweep(
    groups: Sequence[Sequence[Any]], cells: Sequence[Cell], items: Sequence[EvaluationItem], folder: Path
) -> Callable[[], Sequence[Tensor]]:
    """Evaluates group after group; the models of a group share what they can."""

    def run() -> Sequence[Tensor]:
        answers: dict[int, list[str]] = {}
        for models in groups:
            encoder = SharedEncoder(models[0], batch_size=BATCH_SIZE) if len(models) > 1 else None
            for cell in cells:
                for model, records in zip(models, _cell(models, cell, items, encoder, folder), strict=True):
                    answers.setdefault(id(model), []).extend(record["prediction"] for record in records)
        return answers_as_numbers([answer for model in sorted(answers) for answer in answers[model]])

    return run


def _cell(
    models: Sequence[Any], cell: Cell, items: Sequence[EvaluationItem], encoder: SharedEncoder | None, folder: Path
) -> list[list[dict[str, Any]]]:
    respondents = []
    for number, model in enumerate(models):
        path = folder / "predictions" / str(number) / cell.file_name
        path.unlink(missing_ok=True)
        predictor = Predictor(model, batch_size=BATCH_SIZE, max_new_tokens=1, encoder=encoder)
        respondents.append(Respondent(predictor=predictor, path=path))
    return run_cell_together(
        cell,
        items,
        respondents,
        lambda done: None,
        batch_size=BATCH_SIZE,
        after_chunk=encoder.forget if encoder else lambda: None,
    )
