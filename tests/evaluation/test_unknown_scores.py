"""Answers that nobody has judged: no figure, no NaN in a file, and an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from symphony_vlm.cli import app
from symphony_vlm.evaluation.baselines import constant_baselines
from symphony_vlm.evaluation.cell import run_cell
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.runner import EvaluationPlan, evaluate
from symphony_vlm.evaluation.scoring import score_files
from symphony_vlm.evaluation.task import get_task
from symphony_vlm.files import write_json


class _Says:
    def encode_images(self, images: Any) -> torch.Tensor:
        return torch.zeros(len(images), 1, 1)

    def answer(self, items: Any, features: Any) -> list[str]:
        return ["a lake"] * len(items)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "COCO_test2015_000000000001.jpg")
    rows = [{"question_id": i, "image_id": 1, "question": "Where?"} for i in (11, 12)]
    write_json(tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": rows})
    return tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json"


def test_an_evaluations_records_say_null(questions: Path, tmp_path: Path) -> None:
    task = get_task("vqav2")
    items = task.load(questions, None, tmp_path, 0)
    cell = Cell(task=task, corruption="none", severity=0, seed=0)
    run_cell(cell, items, _Says(), tmp_path / "out.jsonl", lambda done: None)  # type: ignore[arg-type]
    text = (tmp_path / "out.jsonl").read_text()
    assert "NaN" not in text
    record = json.loads(text.splitlines()[0])
    assert (record["prediction"], record["score"], record["answer"], record["error"]) == ("a lake", None, None, None)
    assert constant_baselines("vqav2", items, seed=0) == []


def test_records_of_an_evaluation_become_the_servers_file(questions: Path, tmp_path: Path) -> None:
    records = tmp_path / "vqav2.none.0.jsonl"
    records.write_text(json.dumps({"item_id": "12", "prediction": "The Lake", "answer": None}) + "\n")
    arguments = ["score", "--task", "vqav2", "--predictions", str(records), "--annotations", str(questions)]
    result = CliRunner().invoke(app, [*arguments, "--export", str(tmp_path / "server.json"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "server.json").read_text()) == [
        {"question_id": 11, "answer": ""},
        {"question_id": 12, "answer": "lake"},
    ]
    assert json.loads(result.output.splitlines()[-1])["metrics"]["accuracy"] is None


def test_a_task_without_server_or_judge_exports_nothing(tmp_path: Path) -> None:
    write_json(tmp_path / "q.json", {"1": {"question": "Q?", "answer": "yes", "imageId": "n1"}})
    write_json(tmp_path / "p.json", [{"questionId": "1", "prediction": "yes"}])
    files = ["--predictions", str(tmp_path / "p.json"), "--annotations", str(tmp_path / "q.json")]
    result = CliRunner().invoke(app, ["score", "--task", "gqa", *files, "--export", str(tmp_path / "e.json")])
    assert result.exit_code != 0
    assert not (tmp_path / "e.json").exists()
    assert "needs neither a server nor a judge" in str(result.exception)


@pytest.mark.parametrize("name", ["mmvet", "llava_bench", "vqav2"])
def test_an_evaluation_without_scores_says_null_and_its_records_can_be_exported(
    name: str, tiny_model_folder: Path, questions: Path, tmp_path: Path
) -> None:
    picture = "COCO_test2015_000000000001.jpg"
    data = {
        "mmvet": tmp_path / "mm-vet.json",
        "llava_bench": tmp_path / "questions.jsonl",
        "vqav2": questions,
    }[name]
    if name == "mmvet":
        write_json(data, {"v1_0": {"imagename": picture, "question": "Q?", "answer": "a", "capability": ["ocr"]}})
    elif name == "llava_bench":
        data.write_text(json.dumps({"question_id": 0, "image": picture, "category": "conv", "text": "Q?"}) + "\n")
    plan = EvaluationPlan(
        model=str(tiny_model_folder),
        tasks=(name,),
        data=data,
        image_folder=tmp_path,
        corruptions=("fog",),
        severities=(1,),
        max_new_tokens=2,
    )
    evaluate(plan, tmp_path / "out", console=Console(quiet=True))
    rows = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert {row["value"] for row in rows} == {None}
    assert {row["n_errors"] for row in rows} == {0}
    exported = score_files(get_task(name), tmp_path / f"out/predictions/{name}.none.0.jsonl", annotations=data).export()
    assert len(exported) == len(get_task(name).load(data, None, tmp_path, 0))  # type: ignore[arg-type]
