"""A time instead of a number of questions: what is measured, what is chosen, and that it is chosen once."""

from __future__ import annotations

import dataclasses
import json
import threading
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from symphony_vlm.cli import main
from symphony_vlm.data.sample import ImageRef
from symphony_vlm.data.scenes import generate_scenes
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation import budget as budget_module
from symphony_vlm.evaluation import calibration, pictures
from symphony_vlm.evaluation.budget import RESERVED, choose_limit, expected_half_width, half_widths
from symphony_vlm.evaluation.calibration import Costs, measure_costs
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.predictor import Predictor
from symphony_vlm.evaluation.processes import ALONE, Processes
from symphony_vlm.evaluation.runner import EvaluationPlan, evaluate
from symphony_vlm.evaluation.statistics import wilson_interval
from symphony_vlm.evaluation.subset import pictures_in_order
from symphony_vlm.evaluation.task import get_task

QUIET = Console(quiet=True)
CELLS = [
    Cell(task=get_task("short_answer"), corruption=name, severity=severity, seed=0)
    for name, severity in (("none", 0), ("fog", 1), ("fog", 2))
]


def _items(n_pictures: int, each: int = 2, images: Sequence[ImageRef] = ()) -> list[EvaluationItem]:
    return [
        EvaluationItem(id=f"{p}-{q}", question="?", answers=("a",), image_key=f"{p}.png", images=tuple(images))
        for p in range(n_pictures)
        for q in range(each)
    ]


def _choose(minutes: float, items: list[EvaluationItem], costs: Costs, processes: int = 1) -> Any:
    return choose_limit(
        minutes,
        CELLS,
        {"short_answer": items},
        costs,
        spent=3.0,
        seed=0,
        n_models=2,
        processes=processes,
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_the_limit_is_the_largest_number_of_whole_pictures_that_ends_in_time(processes: int) -> None:
    opening = {cell.file_name: 0.01 * (1 + 10 * cell.severity) for cell in CELLS}
    costs = Costs(opening=opening, answering={"short_answer": 0.02})
    items = _items(500)
    limit, record = _choose(2.0, items, costs, processes)
    # A picture of two questions in all three cells; the process with most of them takes longest.
    each = 3 * 2 * 0.02 + sum(opening.values())
    usable = 120 * (1 - RESERVED) - 3.0
    ranks = [Processes(rank=rank, size=processes) for rank in range(processes)]
    owned = [0] * processes
    fitting = 0
    for group in pictures_in_order(items, 0):
        owned = [count + rank.owns(group[0]) for count, rank in zip(owned, ranks, strict=True)]
        fitting += max(owned) * each <= usable
    assert limit == 2 * fitting
    assert record["questions_per_cell"] == {"short_answer": limit}
    assert record["pictures_per_cell"] == {"short_answer": limit // 2}
    assert usable - each < record["predicted_seconds"] <= usable
    assert record["seconds_before"] == 3.0 and record["minutes"] == 2.0


def test_everything_fits_or_nothing_does() -> None:
    costs = Costs(opening={cell.file_name: 0.0 for cell in CELLS}, answering={"short_answer": 1.0})
    limit, record = _choose(10.0, _items(80), costs)
    assert limit is None
    assert record["questions_per_cell"] == {"short_answer": 160}
    with pytest.raises(InputError, match=r"0.05 minutes are too few: one picture in each of 3 cells takes") as error:
        _choose(0.05, _items(80), costs)
    assert error.value.where == "--budget"


def test_the_expected_half_width_is_that_of_a_proportion() -> None:
    best, worst = expected_half_width(800, 100)
    for found, n in ((best, 800), (worst, 100)):
        interval = wilson_interval(n // 2, n)
        # Wilson's interval is narrower by the factor sqrt(n / (n + z^2)).
        assert found == pytest.approx((interval.high - interval.low) / 2, rel=0.02)


def test_half_widths_are_of_the_first_figure_of_each_cell() -> None:
    def row(severity: int, low: float | None, high: float | None, scale: float = 1.0) -> dict[str, Any]:
        return {"task": "t", "corruption": "fog", "severity": severity, "ci_low": low, "ci_high": high, "scale": scale}

    rows = [row(1, 0.4, 0.6), row(1, 0.0, 1.0), row(2, 100.0, 180.0, 200.0), row(3, None, None), row(4, 0.5, 0.8)]
    assert half_widths(rows) == {"median": 0.15, "largest": 0.2}
    assert half_widths([row(1, None, None)]) is None


class Slow:
    """A model that needs 3 s for a picture and 0.5 s for a question, but for the first batch, which takes a minute."""

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock
        self.first = True

    def encode_images(self, images: Sequence[np.ndarray]) -> list[str]:
        self.clock[0] += 3.0 * len(images)
        return ["" for _ in images]

    def answer(self, items: Sequence[EvaluationItem], features: Any) -> list[str]:
        self.clock[0] += 60.0 * self.first + 0.5 * len(items)
        self.first = False
        return ["a"] * len(items)


def test_what_is_measured_is_the_cost_of_pictures_by_cell_and_of_questions_over_all_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    items = _items(300, 4, [ImageRef(path=tmp_path / "a.png", name="a.png")])
    clock = [0.0]
    original = pictures.open_picture

    def opened(ref: ImageRef, cell: Cell, model: object) -> Any:
        clock[0] += 1.0 + 10.0 * cell.severity
        return original(ref, cell, model)

    monkeypatch.setattr(pictures, "open_picture", opened)
    monkeypatch.setattr(calibration, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    models = [Slow(clock), Slow(clock)]
    freed: list[int] = []
    found = measure_costs(
        CELLS,
        {"short_answer": items},
        lambda cell: models,
        seconds=60.0,
        seed=0,
        batch_size=8,
        processes=ALONE,
        after_chunk=lambda: freed.append(1),
    )
    assert found.opening == pytest.approx({cell.file_name: 1.0 + 10.0 * cell.severity for cell in CELLS})
    # Two models, each 3 s for a picture of four questions and 0.5 s for a question.
    assert found.answering == pytest.approx({"short_answer": 2 * (3.0 / 4 + 0.5)})
    assert len(freed) >= 3


@pytest.fixture(scope="module")
def plan(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluationPlan:
    """Two cells of six pictures with eight questions each."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    generate_scenes(folder, train=1, test=6)
    return EvaluationPlan(
        model=str(tiny_model_folder),
        tasks=("scenes",),
        data=folder,
        corruptions=("contrast",),
        severities=(3,),
        max_new_tokens=2,
        budget_minutes=5.0,
    )


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds a question that are measured, and how often they were measured."""
    state = [6.0, 0]

    def measured(cells: Sequence[Cell], items: Any, *args: Any, **more: Any) -> Costs:
        state[1] += 1
        return Costs(opening={cell.file_name: 0.0 for cell in cells}, answering=dict.fromkeys(items, state[0]))

    monkeypatch.setattr(budget_module, "measure_costs", measured)
    return state


def _manifest(output: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((output / "manifest.json").read_text())
    return manifest


def _counts(output: Path) -> dict[str, int]:
    return {path.name: len(path.read_text().splitlines()) for path in (output / "predictions").glob("*.jsonl")}


def test_another_start_continues_with_the_limit_of_the_first_whatever_it_would_measure(
    plan: EvaluationPlan, costs: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Predictor.answer, []

    def interrupted(self: Predictor, items: Any, features: Any) -> Any:
        calls.append(len(items))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, items, features)

    monkeypatch.setattr(Predictor, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(plan, tmp_path, console=QUIET)
    # (5 * 60 * 0.85 - some seconds) / (2 cells * 8 questions * 6 s): two pictures.
    manifest = _manifest(tmp_path)
    assert manifest["limit"] == 16
    assert manifest["budget"]["minutes"] == 5.0
    monkeypatch.setattr(Predictor, "answer", original)
    costs[0] = 0.001
    for minutes in (5.0, 500.0):
        evaluate(dataclasses.replace(plan, budget_minutes=minutes), tmp_path, console=QUIET)
        assert _counts(tmp_path) == {"scenes.none.0.jsonl": 16, "scenes.contrast.3.jsonl": 16}
        assert {name: value for name, value in _manifest(tmp_path).items() if name in manifest} == manifest
    assert costs[1] == 1
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["provenance"]["half_widths"] == half_widths(document["results"])


@pytest.mark.usefixtures("one_model_opens_at_a_time")
def test_all_processes_answer_what_the_first_one_chose(
    plan: EvaluationPlan, costs: list[float], tmp_path: Path
) -> None:
    """Threads stand for processes. Both measure; what the second one would choose is never asked."""
    barrier = threading.Barrier(2, timeout=120)
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        processes = Processes(rank=rank, size=2, barrier=lambda: [barrier.wait()].clear())
        try:
            evaluate(plan, tmp_path, console=QUIET, processes=processes)
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and costs[1] == 2
    limit = _manifest(tmp_path)["limit"]
    assert limit > 16, "two processes do more than the two pictures of one"
    assert set(_counts(tmp_path).values()) == {limit}


def test_a_real_measurement_of_a_small_evaluation_lets_all_of_it_through(plan: EvaluationPlan, tmp_path: Path) -> None:
    evaluate(dataclasses.replace(plan, budget_minutes=60.0), tmp_path, console=QUIET)
    manifest = _manifest(tmp_path)
    assert manifest["limit"] is None
    assert manifest["budget"]["questions_per_cell"] == {"scenes": 48}
    assert manifest["budget"]["seconds_per_question"]["scenes"] > 0
    assert manifest["budget"]["seconds_per_picture"] > 0
    assert set(_counts(tmp_path).values()) == {48}


def test_a_folder_without_a_budget_is_refused(plan: EvaluationPlan, tmp_path: Path) -> None:
    evaluate(dataclasses.replace(plan, budget_minutes=None, corruptions=(), limit=8), tmp_path, console=QUIET)
    with pytest.raises(InputError, match="holds an evaluation without a budget"):
        evaluate(dataclasses.replace(plan, corruptions=()), tmp_path, console=QUIET)


def test_budget_and_limit_together_are_refused(
    plan: EvaluationPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", plan.model, "--task", "scenes", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main(["eval", *arguments, "--limit", "8", "--budget", "20"])
    assert stop.value.code == 2
    error = "error: --limit: the budget chooses the limit. Leave out --limit or --budget."
    assert capsys.readouterr().err.splitlines() == [error]
    assert not (tmp_path / "out").exists()
