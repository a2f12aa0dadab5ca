"""The commands score and verify-scorers, joining predictions to items, and a task of one's own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from symphony_vlm.cli import main
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation import golden
from symphony_vlm.evaluation.golden import Check, verify_scorers
from symphony_vlm.evaluation.scoring import parse_on_unparsed, score_files
from symphony_vlm.evaluation.task import get_task, task_names

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "tasks" / "counting.py"

Records = list[dict[str, Any]]
Said = pytest.CaptureFixture[str]


def write_lines(path: Path, records: Records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def command(capsys: Said, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two multiple choice questions."""
    base = {"question": "Which?", "choices": ["red", "blue"]}
    return write_lines(
        tmp_path / "data.jsonl", [{"id": "1", "answer": "A", **base}, {"id": "2", "answer": "B", **base}]
    )


def predictions(folder: Path, texts: dict[str, Any]) -> Path:
    return write_lines(folder / "answers.jsonl", [{"question_id": key, "text": text} for key, text in texts.items()])


# The command.


def test_score_prints_the_summary_of_the_contract(tmp_path: Path, data: Path, capsys: Said) -> None:
    given = predictions(tmp_path, {"2": "B"})
    arguments = ("score", "--task", "multiple_choice", "--predictions", given, "--annotations", data)
    code, out, err = command(capsys, *arguments, "--json")
    assert code == 0
    summary = json.loads(out.splitlines()[-1])
    assert summary["task"] == "multiple_choice"
    assert summary["metrics"] == {"accuracy": 0.5, "accuracy_lenient": 0.5}
    assert (summary["n_items"], summary["n_unparsed"], summary["missing"]) == (2, 0, 1)
    assert summary["subset"] is False
    assert summary["sha256"] == {
        "predictions": hashlib.sha256(given.read_bytes()).hexdigest(),
        "annotations": hashlib.sha256(data.read_bytes()).hexdigest(),
    }
    assert "warning: 1 predictions are missing and count as wrong, first '1'" in err
    code, out, _ = command(capsys, *arguments)
    assert code == 0 and "accuracy" in out and "0.5000" in out and "2 items, 0 unparsed, 1 missing" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "mmstr"), "no task 'mmstr'; did you mean 'mmstar'?"),
        (("--task", "multiple_choice"), "Give the benchmark's annotation file"),
        (("--task", "multiple_choice", "--on-unparsed", "random"), "must be wrong or random:SEED"),
        (("--task", "multiple_choice", "--on-unparsed", "random:x"), "must be wrong or random:SEED"),
        (("--task", "multiple_choice", "--annotations", "absent.json"), "does not exist"),
        (("--task", "nowhere.py"), "does not exist"),
    ],
)
def test_bad_usage_is_one_clear_line(tmp_path: Path, capsys: Said, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = command(capsys, "score", "--predictions", predictions(tmp_path, {"1": "A"}), *arguments)
    assert code == 2 and message in err and "Traceback" not in err


# Joining.


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"question_id": "1", "text": "A"}', '{"question_id": 1, "text": "B"}'], "line 2: a second answer to '1'"),
        (['{"question_id": "3", "text": "A"}'], "line 1: '3' is no question of the benchmark"),
        (['{"text": "A"}'], "line 1: field 'question_id' .* is missing"),
        (['{"question_id": "1"}'], "line 1: no answer"),
        (['{"question_id": "1", "text": ["A"]}'], "line 1: field 'text' is"),
        (['{"question_id": true, "text": "A"}'], "line 1: field 'question_id' is True"),
        (["[1]"], "line 1: is"),
        (['{"question_id": '], "line 1: is not valid JSON"),
        (["[" * 100_000], "line 1: is not valid JSON"),
        ([""], "holds no records"),
    ],
)
def test_answers_that_cannot_be_joined(tmp_path: Path, data: Path, lines: list[str], message: str) -> None:
    given = tmp_path / "answers.jsonl"
    given.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=message) as caught:
        score_files(get_task("multiple_choice"), given, annotations=data)
    assert "answers.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("map.json", '{"1": "A", "2": "A"}'),
        ("list.json", '[{"id": 1, "prediction": "A"}, {"id": 2, "prediction": "A"}]'),
        (
            "ours.jsonl",
            '{"item_id": "1", "prediction": "A", "answer": "A"}\n{"item_id": "2", "prediction": "A", "answer": "B"}\n',
        ),
        ("table.tsv", 'index\tprediction\n1\tA\n2\t"A"\n'),
        ("bom.jsonl", '\ufeff{"question_id": 1, "text": "A"}\n\n{"question_id": 2, "text": "A"},\n'),
    ],
)
def test_prediction_formats(tmp_path: Path, data: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    score = score_files(get_task("multiple_choice"), tmp_path / name, annotations=data)
    assert score.values["accuracy"] == 0.5 and not score.missing


def test_a_failed_item_of_ours_is_missing_not_right(tmp_path: Path, data: Path) -> None:
    given = write_lines(tmp_path / "r.jsonl", [{"item_id": "1", "prediction": None, "answer": "A", "error": {}}])
    score = score_files(get_task("multiple_choice"), given, annotations=data)
    assert score.values["accuracy"] == 0 and len(score.missing) == 2


def test_guessing_is_seeded_and_only_on_request(tmp_path: Path, data: Path) -> None:
    given = predictions(tmp_path, {"1": "red or blue?", "2": "B"})
    task = get_task("multiple_choice")
    assert score_files(task, given, annotations=data).values["accuracy"] == 0.5
    values = {
        seed: score_files(task, given, annotations=data, on_unparsed=seed).values["accuracy"] for seed in range(9)
    }
    assert set(values.values()) == {0.5, 1.0}
    assert values[3] == score_files(task, given, annotations=data, on_unparsed=3).values["accuracy"]
    # Guesses replace the official score; the missing are not guessed.
    alone = score_files(task, predictions(tmp_path, {"2": "B"}), annotations=data, on_unparsed=0)
    assert alone.values["accuracy"] == 0.5 and alone.missing == ["1"]
    assert parse_on_unparsed("random:42") == 42 and parse_on_unparsed("wrong") is None


def test_a_question_file_that_is_not_needed_is_a_warning(tmp_path: Path, data: Path) -> None:
    given = predictions(tmp_path, {"1": "A", "2": "B"})
    score = score_files(get_task("multiple_choice"), given, annotations=data, questions=tmp_path / "questions.jsonl")
    assert score.values["accuracy"] == 1.0 and "questions" not in score.sha256
    assert score.warnings == ["answers of multiple_choice name their items: the question file was not read"]


def test_an_official_number_of_items_is_named(tmp_path: Path, data: Path) -> None:
    given = predictions(tmp_path, {"1": "A", "2": "B"})
    task = dataclasses.replace(get_task("multiple_choice"), counts={"small": 2, "large": 3})
    assert score_files(task, given, annotations=data).version == "small"
    other = score_files(dataclasses.replace(task, counts={"large": 3}), given, annotations=data)
    assert other.subset and "a subset of 2, not the benchmark's score (official: large: 3)" in other.warnings


# A task of one's own.


def test_the_example_in_the_documentation_scores(tmp_path: Path, capsys: Said) -> None:
    truth = [{"id": n, "image": f"{n}.png", "question": "How many?", "count": n + 2} for n in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(truth))
    given = predictions(tmp_path, {"0": "2", "1": "There are 4.", "2": "many", "3": "5 or 6"})
    code, out, _ = command(
        capsys,
        *("score", "--task", EXAMPLE, "--predictions", given, "--annotations", tmp_path / "data.json", "--json"),
    )
    summary = json.loads(out.splitlines()[-1])
    assert code == 0
    assert summary["metrics"] == {"accuracy": 0.5, "within_one": 0.75}
    assert summary["n_unparsed"] == 1


def test_the_documentation_shows_the_example_as_it_is() -> None:
    assert f"```python\n{EXAMPLE.read_text()}```" in (EXAMPLE.parents[2] / "evaluation.md").read_text()


def test_the_example_is_as_short_as_promised() -> None:
    code = [line for line in EXAMPLE.read_text().splitlines() if line.strip()]
    assert len(code) <= 30


def test_a_file_without_a_task_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(InputError, match="defines no TASK"):
        get_task(str(tmp_path / "empty.py"))


def test_every_module_of_the_folder_is_a_task() -> None:
    folder = Path(golden.__file__).parent / "tasks"
    names = task_names()
    assert len(names) == len(set(names))
    assert len(names) >= len([path for path in folder.glob("*.py") if path.name != "__init__.py"])
    assert {"pope", "mme", "mmbench", "scienceqa", "ai2d", "mmmu", "mmstar", "seedbench", "realworldqa"} <= set(names)


# Golden files.


@pytest.fixture
def golden_folder() -> Path:
    shared = os.environ.get("SYMPHONY_VLM_SHARED_DATA")
    if not shared or not (Path(shared) / "golden").is_dir():
        pytest.skip("no golden files (set SYMPHONY_VLM_SHARED_DATA to the folder above them)")
    return Path(shared) / "golden"


def test_every_golden_figure_is_reproduced(golden_folder: Path) -> None:
    checks = verify_scorers(golden_folder)
    assert len(checks) == 94
    assert [check for check in checks if not check.good] == []


def test_a_difference_ends_with_exit_code_1(golden_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    code, out, _ = command(capsys, "verify-scorers", "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["n_differences"] == 0
    monkeypatch.setattr(golden, "MME_UNPARSED", 11)
    code, out, _ = command(capsys, "verify-scorers", "--golden", golden_folder)
    assert code == 1 and out.count("DIFFERS") == 2 and "92 of 94 figures as expected" in out


def test_a_missing_folder_is_one_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    monkeypatch.delenv("SYMPHONY_VLM_SHARED_DATA", raising=False)
    code, _, err = command(capsys, "verify-scorers")
    assert code == 2 and "--golden DIR" in err
    code, _, err = command(capsys, "verify-scorers", "--golden", tmp_path / "absent")
    assert code == 2 and "is not a folder" in err
    code, _, err = command(capsys, "verify-scorers", "--golden", tmp_path)
    assert code == 2 and "has no folder mme_lavin, mmmu, mmstar, rbench" in err


def test_a_check_without_a_value_is_no_good() -> None:
    assert Check(source="x", figure="y", expected=1.0, got=1.0).good
    assert not Check(source="x", figure="y", expected=1.0, got=1.1).good
    assert not Check(source="x", figure="y", expected=1.0, got=float("nan")).good
