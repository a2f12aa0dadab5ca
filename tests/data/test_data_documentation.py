"""Every example of docs/data.md is opened."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from symphony_vlm.data.datasets import check_samples, open_samples
from symphony_vlm.data.records import sample_from_record

DOCS = Path(__file__).resolve().parents[2] / "docs"
EXAMPLES = DOCS / "examples/data_formats"
PAGE = (DOCS / "data.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "records", "image_uses"),
    [("llava.json", 4, 4), ("messages.jsonl", 5, 5), ("sharegpt.jsonl", 1, 1), ("questions.jsonl", 4, 4)],
)
def test_example_files(name: str, records: int, image_uses: int) -> None:
    report = check_samples(open_samples(EXAMPLES / name))
    assert (report.n_records, report.n_image_uses, report.faults) == (records, image_uses, ())
    assert f"`{name}`" in PAGE


def test_no_example_file_is_forgotten() -> None:
    assert {path.name for path in EXAMPLES.glob("*.json*")} == {
        "llava.json",
        "messages.jsonl",
        "sharegpt.jsonl",
        "questions.jsonl",
    }


def test_records_in_the_text_are_those_of_the_files() -> None:
    samples = [
        sample_from_record(json.loads(block), where="docs", index=0, image_folder=EXAMPLES) for block in blocks("json")
    ]
    files = [(EXAMPLES / "llava.json", 0), (EXAMPLES / "messages.jsonl", 1), (EXAMPLES / "questions.jsonl", 0)]
    expected = [open_samples(path)[index] for path, index in files]
    assert [sample.messages for sample in samples] == [sample.messages for sample in expected]
    assert [sample.images for sample in samples] == [sample.images for sample in expected]


def test_code_in_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    monkeypatch.chdir(tmp_path / "examples")
    code = blocks("python")
    assert len(code) == 3
    for block in code:
        exec(block, {})
    for name in ("train.parquet", "saved", "train-000000.tar"):
        report = check_samples(open_samples(name))
        assert (report.n_records, report.n_images, report.faults) == (1, 1, ())
