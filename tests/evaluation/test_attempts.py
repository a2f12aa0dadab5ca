"""Failures stay with the things that failed, and batches shrink where memory is short."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from symphony_vlm.data.sample import ImageRef
from symphony_vlm.evaluation.attempts import Failure, attempt
from symphony_vlm.evaluation.cell import run_cell
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.task import get_task


def doubled(numbers: Sequence[int]) -> list[int]:
    if 13 in numbers:
        raise ValueError("thirteen")
    return [2 * number for number in numbers]


@pytest.mark.parametrize("numbers", [[], [13], [1], [13, 1, 2], list(range(20)), [13, 13, 4, 13]])
def test_results_are_those_of_single_things_and_failures_stay_where_they_are(numbers: list[int]) -> None:
    expected = [Failure("ValueError", "thirteen") if number == 13 else 2 * number for number in numbers]
    assert attempt(doubled, numbers) == expected


def test_a_batch_that_fails_by_itself_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """No single thing is at fault, every answer is there, and without a word it would only be slow."""

    def only_few(things: Sequence[int]) -> list[int]:
        if len(things) > 2:
            raise ValueError("too many for me")
        return list(things)

    assert attempt(only_few, [1, 2, 3, 4]) == [1, 2, 3, 4]
    assert "a batch of 4 failed, and its halves did not" in caplog.text and "too many for me" in caplog.text
    caplog.clear()
    attempt(doubled, [13, 1, 2])
    assert not caplog.records, "one of the things explains it"


def test_a_wrong_number_of_results_is_our_fault_and_no_failure_of_things() -> None:
    with pytest.raises(RuntimeError, match="1 results for 2 things"):
        attempt(lambda things: things[:1], [1, 2])


class Small:
    """A model whose device holds a few questions at a time; some questions break it."""

    def __init__(self, holds: int, poison: str = "") -> None:
        self.holds = holds
        self.poison = poison
        self.sizes: list[int] = []

    def encode_images(self, images: Sequence[np.ndarray]) -> list[float]:
        if any(image.max() == 0 for image in images):
            raise RuntimeError("black picture")
        return [float(image.max()) for image in images]

    def answer(self, items: Sequence[EvaluationItem], features: Sequence[Any]) -> list[str]:
        self.sizes.append(len(items))
        if len(items) > self.holds:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        if any(item.question == self.poison for item in items):
            raise IndexError("index 7 is out of bounds")
        return [f"{item.id}: {images[0]:.0f}" for item, images in zip(items, features, strict=True)]


@pytest.fixture
def items(tmp_path: Path) -> list[EvaluationItem]:
    """Forty questions about ten pictures, of which the first is black."""
    found = []
    for number in range(10):
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.full((8, 8, 3), 10 * number, dtype=np.uint8)).save(path)
        ref = ImageRef(path=path, name=path.name)
        for q in range(4):
            found.append(
                EvaluationItem(
                    id=f"{number}-{q}", question=f"{number}-{q}", answers=("",), images=(ref,), image_key=str(path)
                )
            )
    return found


def run(model: Small, items: Sequence[EvaluationItem], path: Path, batch_size: int) -> dict[str, dict[str, Any]]:
    cell = Cell(task=get_task("short_answer"), corruption="none", severity=0, seed=0)
    return {r["item_id"]: r for r in run_cell(cell, items, model, path, lambda done: None, batch_size=batch_size)}


def test_a_batch_too_large_for_the_device_is_halved_and_the_smaller_size_stays(
    items: list[EvaluationItem], tmp_path: Path
) -> None:
    model = Small(holds=6)
    records = run(model, items[4:], tmp_path / "out.jsonl", 16)
    assert [records[item.id]["prediction"] for item in items[4:]] == [
        f"{item.id}: {10 * int(item.id[0])}" for item in items[4:]
    ]
    assert all(record["error"] is None for record in records.values())
    # 16 fails, and so does the first 8; the rest of that batch in parts that fit, and all others in fours.
    assert model.sizes == [16, 8, 4, 4, 8, 4, 4, *[4] * 5]


def test_where_a_single_question_is_too_large_it_alone_has_an_error(
    items: list[EvaluationItem], tmp_path: Path
) -> None:
    records = run(Small(holds=0), items[4:8], tmp_path / "out.jsonl", 16)
    for record in records.values():
        assert record["error"]["type"] == "OutOfMemoryError"
        assert (record["prediction"], record["score"], record["parse_status"]) == (None, None, "error")


@pytest.mark.parametrize("batch_size", [1, 16, 64])
def test_a_picture_and_a_question_that_break_the_model_take_nobody_with_them(
    items: list[EvaluationItem], tmp_path: Path, batch_size: int
) -> None:
    records = run(Small(holds=64, poison="5-2"), items, tmp_path / "out.jsonl", batch_size)
    failed = {name: record["error"] for name, record in records.items() if record["error"]}
    black = {f"0-{q}": {"type": "RuntimeError", "message": "black picture"} for q in range(4)}
    assert failed == black | {"5-2": {"type": "IndexError", "message": "index 7 is out of bounds"}}
    assert records["5-1"]["prediction"] == "5-1: 50"
    assert len(records) == 40
