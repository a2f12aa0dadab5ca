"""`data split`: two files that share no image, and the records as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from symphony_vlm.cli import app
from symphony_vlm.data.datasets import open_samples
from symphony_vlm.data.held_out import write_held_out
from symphony_vlm.errors import InputError


def records(number: int = 60) -> list[dict[str, Any]]:
    """Three questions to a picture; every tenth record has none; fields of their own stay."""
    found = []
    for index in range(number):
        turns = [{"from": "human", "value": f"Wie heißt {index}?"}, {"from": "gpt", "value": "ü"}]
        record: dict[str, Any] = {"id": f"r{index}", "source": f"s{index % 2}", "conversations": turns, "own": [index]}
        if index % 10:
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
            record["image"] = f"p{index // 3}.png"
        found.append(record)
    return found


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"p{number}.png")
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    found: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else []
    return found or json.loads(text)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_both_files_together_are_the_one_and_share_no_image(tmp_path: Path, images: Path, suffix: str) -> None:
    data = write(tmp_path / f"all{suffix}", records())
    source = open_samples(data, image_folder=images)
    made = write_held_out(source, tmp_path / "parts", fraction=0.2, seed=0)
    train, test = read(made.train), read(made.test)
    assert sorted([*train, *test], key=lambda row: int(row["id"][1:])) == records()
    assert len(test) == 12
    shared = {row.get("image", row["id"]) for row in train} & {row.get("image", row["id"]) for row in test}
    assert not shared
    assert sum(made.train_records.values()) == 48 and sum(made.test_records.values()) == 12
    assert made.test_records == {name: sum(row["source"] == name for row in test) for name in ("s0", "s1")}
    # Both can be trained on and asked about, and say in which order.
    assert [sample.id for sample in open_samples(made.train, image_folder=images)] == [row["id"] for row in train]
    other = write_held_out(source, tmp_path / "other", fraction=0.2, seed=1)
    assert read(other.test) != test


def test_copies_of_a_picture_under_another_name_are_the_same_picture(tmp_path: Path, images: Path) -> None:
    for number in range(1, 20):
        (images / f"p{number}.png").write_bytes((images / f"p{number % 2}.png").read_bytes())
    rows = [row for row in records() if "image" in row]
    source = open_samples(write(tmp_path / "all.json", rows), image_folder=images)
    made = write_held_out(source, tmp_path / "parts", fraction=0.5, seed=0)
    odd = [{int(row["image"][1:-4]) % 2 for row in read(path)} for path in (made.train, made.test)]
    assert sorted(map(sorted, odd)) == [[0], [1]]


def test_a_picture_that_is_missing_is_named(tmp_path: Path, images: Path) -> None:
    (images / "p7.png").unlink()
    source = open_samples(write(tmp_path / "all.json", records()), image_folder=images)
    with pytest.raises(InputError, match=r"p7\.png"):
        write_held_out(source, tmp_path / "parts", fraction=0.5, seed=0)


def test_the_command_says_how_many_of_each_source(tmp_path: Path, images: Path) -> None:
    data = write(tmp_path / "all.json", records())
    options = ["--data", str(data), "--image-folder", str(images), "--output", str(tmp_path / "parts")]
    result = CliRunner().invoke(app, ["data", "split", *options, "--fraction", "0.2", "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["test"] == str(tmp_path / "parts" / "test.json")
    assert {part: sum(found.values()) for part, found in summary["records"].items()} == {"train": 48, "test": 12}


@pytest.mark.parametrize(
    ("change", "fraction", "problem"),
    [
        (lambda path: path, 0.0, "it must be above 0 and below 1"),
        (lambda path: path, 1.0, "it must be above 0 and below 1"),
        (lambda path: write(path, records()[1:3]), 0.5, "all records share one image"),
        (lambda path: write(path, [{"id": "x"}, *records()]), 0.5, "all.json"),
    ],
    ids=["nothing", "everything", "one image", "a malformed record"],
)
def test_what_cannot_be_divided_leaves_nothing_behind(
    tmp_path: Path, images: Path, change: Any, fraction: float, problem: str
) -> None:
    data = write(tmp_path / "all.json", records())
    change(data)
    with pytest.raises(InputError, match=problem):
        write_held_out(open_samples(data, image_folder=images), tmp_path / "parts", fraction=fraction, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.json", "images"]


def test_a_folder_that_exists_is_left_alone(tmp_path: Path, images: Path) -> None:
    data = write(tmp_path / "all.json", records())
    with pytest.raises(InputError, match="exists already"):
        write_held_out(open_samples(data, image_folder=images), images, fraction=0.5, seed=0)
    assert len(list(images.iterdir())) == 20
