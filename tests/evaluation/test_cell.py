"""One cell: records in order, pictures read once, and failures that stay with their items."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from symphony_vlm.data.sample import ImageRef
from symphony_vlm.evaluation.cell import run_cell
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.records import read_records
from symphony_vlm.evaluation.task import EvaluationItem, get_task


class Echo:
    """Answers with the first feature of the picture, so that an answer shows which pixels it was given for."""

    def __init__(self) -> None:
        self.encoded = 0
        self.asked: list[str] = []

    def encode_images(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        self.encoded += len(images)
        return [torch.tensor([[float(image.mean())]]) for image in images]

    def answer(self, items: Sequence[EvaluationItem], features: Sequence[Sequence[torch.Tensor] | None]) -> list[str]:
        self.asked += [item.id for item in items]
        return ["none" if f is None else " ".join(f"{float(image):.3f}" for image in f) for f in features]


@pytest.fixture
def pictures(tmp_path: Path) -> list[ImageRef]:
    refs = []
    for number in range(3):
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.full((16, 16, 3), 40 * (number + 1), dtype=np.uint8)).save(path)
        refs.append(ImageRef(path=path, name=path.name))
    return refs


def _item(number: int, *images: ImageRef) -> EvaluationItem:
    key = "+".join(str(ref.path) for ref in images) or f"id:{number}"
    return EvaluationItem(id=f"q{number}", question="?", answers=("40.000",), images=images, image_key=key)


def _cell(corruption: str = "none", severity: int = 0, seed: int = 0) -> Cell:
    return Cell(task=get_task("short_answer"), corruption=corruption, severity=severity, seed=seed)


def _run(cell: Cell, items: Sequence[EvaluationItem], path: Path, predictor: Any = None) -> list[dict[str, Any]]:
    return run_cell(cell, items, predictor or Echo(), path, lambda done: None)


def test_each_item_is_answered_with_its_own_pictures_and_written_in_order(
    pictures: list[ImageRef], tmp_path: Path
) -> None:
    items = [_item(0, pictures[0]), _item(1, pictures[0]), _item(2), _item(3, pictures[2], pictures[1])]
    predictor = Echo()
    records = _run(_cell(), items, tmp_path / "out.jsonl", predictor)
    assert [record["prediction"] for record in records] == ["40.000", "40.000", "none", "120.000 80.000"]
    assert [record["score"] for record in records] == [1.0, 1.0, 0.0, 0.0]
    assert read_records(tmp_path / "out.jsonl") == records
    assert predictor.encoded == 3, "a picture of two questions is encoded once"
    assert (records[2]["image_sha256"], records[2]["pixels_sha256"]) == (None, None)


def test_a_broken_picture_fails_its_own_items_only(pictures: list[ImageRef], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"GIF89a")
    bad = ImageRef(path=broken, name="broken.png")
    items = [_item(0, pictures[0]), _item(1, bad), _item(2, bad), _item(3, pictures[1], bad), _item(4, pictures[1])]
    records = _run(_cell(), items, tmp_path / "out.jsonl")
    assert [record["error"] is None for record in records] == [True, False, False, False, True]
    assert [record["score"] is None for record in records] == [False, True, True, True, False]
    assert "broken.png" in records[1]["error"]["message"]
    assert records[4]["prediction"] == "80.000"


def test_items_already_answered_are_neither_asked_nor_encoded_again(pictures: list[ImageRef], tmp_path: Path) -> None:
    items = [_item(i, pictures[i // 2]) for i in range(6)]
    first = _run(_cell(), items[:3], tmp_path / "out.jsonl")
    predictor = Echo()
    counted: list[int] = []
    records = run_cell(_cell(), items, predictor, tmp_path / "out.jsonl", counted.append)  # type: ignore[arg-type]
    assert predictor.asked == ["q3", "q4", "q5"]
    assert records[:3] == first
    assert sum(counted) == 6
    assert counted[0] == 3


def test_corrupted_pixels_depend_on_picture_name_severity_and_seed_only(
    pictures: list[ImageRef], tmp_path: Path
) -> None:
    def pixels(*numbers: int, name: str, **cell: Any) -> dict[str, str]:
        items = [_item(number, pictures[number]) for number in numbers]
        records = _run(_cell("gaussian_noise", **cell), items, tmp_path / name)
        return {record["item_id"]: record["pixels_sha256"] for record in records}

    base = pixels(0, 1, 2, name="a", severity=2)
    assert pixels(2, 0, name="b", severity=2) == {key: base[key] for key in ("q2", "q0")}
    assert len(set(base.values())) == 3
    for name, changes in (("c", {"severity": 3}), ("d", {"severity": 2, "seed": 1})):
        other = pixels(0, 1, 2, name=name, **changes)
        assert all(other[key] != value for key, value in base.items())


def test_the_clean_cell_shows_the_files_own_pixels(pictures: list[ImageRef], tmp_path: Path) -> None:
    import hashlib

    (record,) = _run(_cell(), [_item(0, pictures[0])], tmp_path / "out.jsonl")
    assert pictures[0].path is not None
    assert record["image_sha256"] == hashlib.sha256(pictures[0].path.read_bytes()).hexdigest()
    assert record["pixels_sha256"] == hashlib.sha256(np.full((16, 16, 3), 40, dtype=np.uint8).tobytes()).hexdigest()


def test_a_torn_last_line_is_cut_off_the_file_and_whole_lines_stay(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"item_id": "a", "prediction": ""}\n{"item_id": "ü", "prediction": null}\n{"item')
    assert [record["item_id"] for record in read_records(path)] == ["a", "ü"]
    assert path.read_text().endswith("null}\n")
    assert read_records(tmp_path / "missing") == []


def test_records_are_plain_unicode_json_lines(pictures: list[ImageRef], tmp_path: Path) -> None:
    item = EvaluationItem(id="ü", question="a\nb\u2028c?", answers=("é",), images=(pictures[0],), image_key="k")
    _run(_cell(), [item], tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_bytes().split(b"\n")
    assert len(lines) == 2
    assert json.loads(lines[0])["question"] == "a\nb\u2028c?"
    assert "é".encode() in lines[0]
