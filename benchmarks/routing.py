"""What recording the routers adds to an evaluation (`eval --routing`).

A clean cell is answered without and with its routing stored, and a corrupted one without and with the comparison, files
included. Answers must be equal. The model and the questions are those of the benchmark `evaluate`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.evaluate import answers_as_numbers, random_model
from benchmarks.measure import Case, Plan
from symphony_vlm.data.scenes import generate_scenes
from symphony_vlm.evaluation.cell import run_cell
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.opening import OpenedModel
from symphony_vlm.evaluation.routing.run import RoutingRun
from symphony_vlm.evaluation.task import get_task

__all__ = ["PLAN", "cases"]

PLAN = Plan(rounds=1, alternations=5, seconds=0.0)

BATCH_SIZE = 64


def cases(*, tiny: bool, device: torch.device) -> Iterator[Case]:
    """A clean and a corrupted cell, answers of 1 token and of 16.

    Args:
        tiny: sizes for a test of the benchmark.
        device: where the model is.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scenes = generate_scenes(folder / "scenes", train=8, test=2 if tiny else 8)
        model = random_model("tiny" if tiny else "instruct_small", scenes.train_json, folder).to(device).eval()
        opened = OpenedModel(model=model, processor=model.processor, router=model.config.moe["router"], is_stock=False)
        items = list(get_task("scenes").load(folder / "scenes", None, folder, 0))
        for longest in (2,) if tiny else (1, 16):
            for corruption, severity in (("none", 0), ("fog", 3)):
                yield _case(opened, items, longest, folder, corruption, severity)


def _case(
    opened: OpenedModel, items: Sequence[EvaluationItem], longest: int, folder: Path, corruption: str, severity: int
) -> Case:
    task = get_task("scenes")
    clean = Cell(task=task, corruption="none", severity=0, seed=0)
    cell = Cell(task=task, corruption=corruption, severity=severity, seed=0)
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    routing = RoutingRun(opened, output, rank=0)
    if severity:
        _answer(routing.of_cell(clean), clean, items, longest, output)

    def recorded() -> Sequence[Tensor]:
        # As in an evaluation, where no file of the cell is there yet.
        if not severity:
            shutil.rmtree(output / "routing", ignore_errors=True)
        result = _answer(routing.of_cell(cell), cell, items, longest, output)
        routing.finish(cell, [item.id for item in items])
        return result

    contenders: dict[str, Callable[[], Sequence[Tensor]]] = {
        "answers": lambda: _answer(opened, cell, items, longest, output),
        "answers and routing": recorded,
    }
    settings: dict[str, int | str] = {"questions": len(items), "corruption": corruption, "new tokens": longest}
    return Case(settings=settings, contenders=contenders)


def _answer(
    opened: OpenedModel, cell: Cell, items: Sequence[EvaluationItem], longest: int, output: Path
) -> tuple[Tensor]:
    path = output / "predictions" / cell.file_name
    path.unlink(missing_ok=True)
    predictor: Any = opened.predictor(batch_size=BATCH_SIZE, max_new_tokens=longest)
    records = run_cell(cell, items, predictor, path, lambda done: None, batch_size=BATCH_SIZE)
    return answers_as_numbers([record["prediction"] for record in records])
