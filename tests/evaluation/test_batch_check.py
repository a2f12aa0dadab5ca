"""``--check-batch``: answers alone against answers in batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from symphony_vlm.data.scenes import generate_scenes
from symphony_vlm.evaluation.batch_check import check_batches
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.predictor import Predictor
from symphony_vlm.evaluation.report import write_report
from symphony_vlm.evaluation.runner import EvaluationPlan, evaluate
from symphony_vlm.evaluation.task import get_task


class Moody:
    """Answers some questions otherwise in company: ``case`` keeps the score, ``flip`` does not."""

    def encode_images(self, images: Sequence[Any]) -> list[Any]:
        return list(images)

    def answer(self, items: Sequence[EvaluationItem], features: Sequence[Any]) -> list[str]:
        alone = len(items) == 1
        says = {"same": "yes", "case": "yes" if alone else "YES", "flip": "yes" if alone else "no"}
        return [says[item.question] for item in items]


def check(questions: Sequence[str], n_items: int, seed: int = 0) -> dict[str, Any]:
    cell = Cell(task=get_task("short_answer"), corruption="none", severity=0, seed=seed)
    items = [EvaluationItem(id=f"{n:02}", question=q, answers=("yes",)) for n, q in enumerate(questions)]
    return check_batches(cell, items, lambda size: Moody(), n_items=n_items, batch_size=4)


def test_texts_that_differ_and_scores_that_flip_are_told_apart() -> None:
    found = check(["same", "case", "same", "flip", "case", "same"], 6)
    assert (found["text_differences"], found["score_flips"]) == (["01", "03", "04"], ["03"])
    assert (found["n_items"], found["batch_size"], found["batch_invariant"]) == (6, 4, False)
    assert check(["same", "case"], 2)["batch_invariant"] is True


def test_the_sample_is_seeded() -> None:
    first, again, other = (check(["flip"] * 40, 10, seed)["score_flips"] for seed in (0, 0, 1))
    assert len(first) == 10 and first == again != other


@pytest.fixture
def plan(tiny_model_folder: Path, tmp_path: Path) -> EvaluationPlan:
    generate_scenes(tmp_path / "scenes", train=1, test=2)
    return EvaluationPlan(
        model=str(tiny_model_folder), tasks=("scenes",), data=tmp_path / "scenes", max_new_tokens=4, check_batch=6
    )


def test_in_fp32_the_batch_changes_nothing_and_the_results_say_so(plan: EvaluationPlan, tmp_path: Path) -> None:
    output = tmp_path / "out"
    evaluate(plan, output, console=Console(quiet=True))
    (found,) = json.loads((output / "results.json").read_text())["batch_check"]
    assert found["text_differences"] == found["score_flips"] == []
    assert (found["n_items"], found["batch_size"]) == (6, 64)
    assert json.loads((output / "manifest.json").read_text())["batch_invariant"] is True


def test_a_flip_is_said_in_the_manifest_and_in_the_report(
    plan: EvaluationPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(self: Predictor, items: Sequence[EvaluationItem], features: Any) -> list[str]:
        return [item.answers[0] if len(items) == 1 else "nothing" for item in items]

    monkeypatch.setattr(Predictor, "answer", answer)
    output = tmp_path / "out"
    for _ in range(2):  # the second start checks again, and does not take the note for another evaluation
        evaluate(plan, output, console=Console(quiet=True))
    assert json.loads((output / "manifest.json").read_text())["batch_invariant"] is False
    write_report([output], output)
    document = json.loads((output / "results.json").read_text())
    assert len(document["batch_check"][0]["score_flips"]) == 6
    assert any("depend on the batch size" in warning for warning in document["robustness"]["warnings"])
