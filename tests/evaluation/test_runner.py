"""Evaluations: what they write, that they continue exactly, and that nothing fails in silence."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from symphony_vlm.cli import main
from symphony_vlm.data.scenes import generate_scenes
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation import cell as cell_module
from symphony_vlm.evaluation.answer import Answer
from symphony_vlm.evaluation.predictor import Predictor
from symphony_vlm.evaluation.runner import EvaluationPlan, EvaluationSummary, evaluate
from symphony_vlm.files import write_json

RESULT_FIELDS = {
    "model",
    "router",
    "task",
    "split",
    "corruption",
    "severity",
    "attack",
    "metric",
    "value",
    "higher_is_better",
    "scale",
    "ci_low",
    "ci_high",
    "n_items",
    "n_images",
    "n_errors",
    "n_unparsed",
}
RECORD_FIELDS = {
    "item_id",
    "task",
    "image_sha256",
    "pixels_sha256",
    "corruption",
    "severity",
    "seed",
    "question",
    "prediction",
    "answer",
    "parsed",
    "parse_status",
    "score",
    "error",
    "question_id",
    "corrupt_at",
    "prompt_sha256",
    "n_prompt_tokens",
    "n_new_tokens",
    "stop_reason",
    "seconds",
    "rank",
}
Run = Callable[..., EvaluationSummary]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten test pictures with eight questions each."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    generate_scenes(folder, train=1, test=10)
    return folder


@pytest.fixture(scope="module")
def plan(tiny_model_folder: Path, scenes: Path) -> EvaluationPlan:
    """A clean cell and four corrupted ones of two pictures each."""
    return EvaluationPlan(
        model=str(tiny_model_folder),
        tasks=("scenes",),
        data=scenes,
        corruptions=("fog", "gaussian_noise"),
        severities=(1, 5),
        limit=12,
        max_new_tokens=4,
    )


@pytest.fixture(scope="module")
def run(plan: EvaluationPlan) -> Run:
    """Runs the plan with changes."""

    def evaluate_changed(output: Path, **changes: Any) -> EvaluationSummary:
        return evaluate(dataclasses.replace(plan, **changes), output, console=Console(quiet=True))

    return evaluate_changed


@pytest.fixture(scope="module")
def finished(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted evaluation; tests only read it."""
    output = tmp_path_factory.mktemp("evaluation") / "finished"
    run(output)
    return output


def _predictions(output: Path) -> dict[str, str]:
    """The files' texts without the two fields that say when and where."""
    files = sorted((output / "predictions").glob("*.jsonl"))
    return {path.name: re.sub(r', "seconds": [0-9.e-]+, "rank": \d+}\n', "}\n", path.read_text()) for path in files}


def _records(output: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "predictions" / name).read_text().splitlines()]


def _results(output: Path) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = json.loads((output / "results.json").read_text())["results"]
    return results


def _command(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, list[str]]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["eval", *arguments])
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err.splitlines()


# What is written.


def test_results_have_the_documented_fields_one_row_a_cell_and_a_row_a_group(finished: Path) -> None:
    results = _results(finished)
    assert all(set(row) == RESULT_FIELDS for row in results)
    cells = [(row["corruption"], row["severity"]) for row in results if row["metric"] == "accuracy"]
    assert cells == [("none", 0), ("fog", 1), ("fog", 5), ("gaussian_noise", 1), ("gaussian_noise", 5)]
    groups = [row for row in results if row["metric"].startswith("accuracy/")]
    assert {row["corruption"] for row in groups} == {"none"}
    assert sum(row["n_items"] for row in groups) == results[0]["n_items"]
    for row in results:
        assert 0 <= row["ci_low"] <= row["value"] <= row["ci_high"] <= 1
        assert row["higher_is_better"] is True
        assert row["router"] == "symphony_smoe"


def test_the_provenance_says_what_produced_the_results(finished: Path) -> None:
    document = json.loads((finished / "results.json").read_text())
    provenance, manifest = document["provenance"], json.loads((finished / "manifest.json").read_text())
    assert {"versions", "git", "hardware", "wall_seconds", "corruption_canary", "config_sha256"} <= provenance.keys()
    for name in ("seed", "model_sha256", "items_sha256"):
        assert provenance[name] == manifest[name]
    assert manifest["decoding"] == "greedy"
    assert {baseline["task"] for baseline in document["baselines"]} == {"scenes"}


def test_a_record_has_the_documented_fields_and_a_score_that_follows_from_it(finished: Path) -> None:
    for name in _predictions(finished):
        for record in _records(finished, name):
            assert record.keys() >= RECORD_FIELDS
            assert record["error"] is None
            assert record["score"] == float(record["parsed"] == record["answer"].lower())
            assert f"{record['task']}.{record['corruption']}.{record['severity']}.jsonl" == name


def test_the_accuracy_is_the_mean_of_the_records_scores(finished: Path) -> None:
    for row in _results(finished):
        if row["metric"] == "accuracy":
            records = _records(finished, f"scenes.{row['corruption']}.{row['severity']}.jsonl")
            assert row["value"] == pytest.approx(np.mean([record["score"] for record in records]))
            assert row["n_items"] == len(records)
            assert row["n_images"] == len({record["image_sha256"] for record in records})


def test_a_limit_takes_whole_pictures(finished: Path) -> None:
    records = _records(finished, "scenes.none.0.jsonl")
    assert len(records) == 16, "the first number of whole pictures with at least 12 questions"
    assert len({record["image_key"] for record in records}) == 2


def test_the_model_says_something_so_that_comparing_answers_means_something(finished: Path) -> None:
    answers = [r["prediction"] for name in _predictions(finished) for r in _records(finished, name)]
    assert len(set(answers)) > 3
    assert sum(map(bool, answers)) > len(answers) // 2


def test_a_model_that_wants_to_say_the_image_placeholder_says_something_else(
    plan: EvaluationPlan, scenes: Path, tmp_path: Path
) -> None:
    """As a word of an answer it would be taken for an image that is not there, and end the evaluation."""
    import symphony_vlm

    model = symphony_vlm.load(plan.model, device="cpu")
    assert model.processor is not None
    head = model.get_output_embeddings()
    original = head.forward
    image_token = model.config.image_token_id

    def forward(hidden: Any) -> Any:
        logits = original(hidden)
        logits[..., image_token] = 1e4
        return logits

    head.forward = forward
    picture = next((scenes / "images" / "test").glob("*.png"))
    assert "<image>" not in model.chat("What is it?", images=picture, max_new_tokens=4)


# Equal results.


def test_two_evaluations_with_the_same_seed_write_the_same_bytes(finished: Path, run: Run, tmp_path: Path) -> None:
    run(tmp_path / "again")
    assert _predictions(tmp_path / "again") == _predictions(finished)
    assert _results(tmp_path / "again") == _results(finished)


def test_another_seed_takes_other_pictures_and_other_noise(finished: Path, run: Run, tmp_path: Path) -> None:
    run(tmp_path / "other", seed=1, limit=None, corruptions=("gaussian_noise",), severities=(1,))
    other = {
        r["image_sha256"]: r["pixels_sha256"] for r in _records(tmp_path / "other", "scenes.gaussian_noise.1.jsonl")
    }
    mine = {r["image_sha256"]: r["pixels_sha256"] for r in _records(finished, "scenes.gaussian_noise.1.jsonl")}
    assert mine.keys() <= other.keys()
    assert all(other[key] != value for key, value in mine.items())


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_batch_size_changes_no_answer(finished: Path, run: Run, tmp_path: Path, batch_size: int) -> None:
    """Texts of unequal length are padded; greedy answers in fp32 must not notice."""
    run(tmp_path / "other", batch_size=batch_size)
    assert _predictions(tmp_path / "other") == _predictions(finished)


def test_a_corrupted_picture_has_the_same_pixels_in_any_order_of_cells_and_with_any_limit(
    finished: Path, run: Run, tmp_path: Path
) -> None:
    run(tmp_path / "more", corruptions=("gaussian_noise", "fog"), severities=(5,), limit=40)
    for name in ("scenes.fog.5.jsonl", "scenes.gaussian_noise.5.jsonl"):
        few = {record["item_id"]: record for record in _records(finished, name)}
        many = {record["item_id"]: record for record in _records(tmp_path / "more", name)}
        assert len(few) < len(many)
        now = {"seconds": 0.0}
        assert all(many[key] | now == record | now for key, record in few.items())


def test_the_corrupted_cells_pictures_are_the_first_of_the_clean_cells(run: Run, tmp_path: Path) -> None:
    run(tmp_path / "out", limit=40, corrupted_limit=8, corruptions=("fog",), severities=(1,))
    run(tmp_path / "few", limit=8, corruptions=())
    clean, foggy = (_records(tmp_path / "out", f"scenes.{name}.jsonl") for name in ("none.0", "fog.1"))
    assert (len(clean), len(foggy)) == (40, 8)
    assert {record["item_id"] for record in foggy} < {record["item_id"] for record in clean}
    assert [r["item_id"] for r in foggy] == [r["item_id"] for r in _records(tmp_path / "few", "scenes.none.0.jsonl")]


def test_another_folder_with_the_same_pictures_gives_the_same_subset(
    finished: Path, run: Run, scenes: Path, tmp_path: Path
) -> None:
    shutil.copytree(scenes, tmp_path / "moved" / "elsewhere")
    run(tmp_path / "out", data=tmp_path / "moved" / "elsewhere", corruptions=())
    ids = [record["item_id"] for record in _records(tmp_path / "out", "scenes.none.0.jsonl")]
    assert ids == [record["item_id"] for record in _records(finished, "scenes.none.0.jsonl")]


# Continuing.


def test_running_again_answers_nothing_and_gives_the_same_results(
    finished: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    asked: list[int] = []
    original = Predictor.answer
    monkeypatch.setattr(
        Predictor, "answer", lambda self, items, f: asked.append(len(items)) or original(self, items, f)
    )
    run(tmp_path / "copy")
    assert sum(asked) == 0
    assert _predictions(tmp_path / "copy") == _predictions(finished)
    assert _results(tmp_path / "copy") == _results(finished)


def test_an_evaluation_killed_in_the_middle_and_continued_equals_an_uninterrupted_one(
    plan: EvaluationPlan, tmp_path: Path
) -> None:
    arguments = ["--model", plan.model, "--task", "scenes", "--data", str(plan.data), "--limit", "24"]
    arguments += ["--corruption", "fog,gaussian_noise,contrast,pixelate", "--max-new-tokens", "4"]
    command = [sys.executable, "-m", "symphony_vlm.cli", "eval", *arguments, "--output"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [*command, str(killed)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    give_up = time.monotonic() + 240
    while len(list((killed / "predictions").glob("*.jsonl"))) < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert not (killed / "results.json").exists()
    assert 5 <= len(_predictions(killed)) < 21
    for output in (killed, tmp_path / "whole"):
        with pytest.raises(SystemExit) as stop:
            main(["eval", *arguments, "--output", str(output)])
        assert not stop.value.code
    assert _predictions(killed) == _predictions(tmp_path / "whole")
    assert _results(killed) == _results(tmp_path / "whole")


def test_an_interruption_inside_a_cell_answers_no_item_twice(
    finished: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell_module, "IMAGES_AT_ONCE", 1)
    original, calls = Predictor.answer, []

    def answer(self: Predictor, items: Any, features: Any) -> list[Answer]:
        calls.append(len(items))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, items, features)

    monkeypatch.setattr(Predictor, "answer", answer)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out")
    run(tmp_path / "out")
    assert _predictions(tmp_path / "out") == _predictions(finished)
    assert sum(calls) == 5 * 16 + calls[3]


@pytest.mark.parametrize("torn", ['{"item_id": "scenes-te', '{"item_id": "a"}', "{}", "\x00\x00"])
def test_a_last_line_torn_by_a_kill_is_repaired(finished: Path, run: Run, tmp_path: Path, torn: str) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    path = tmp_path / "copy" / "predictions" / "scenes.fog.5.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + torn)
    run(tmp_path / "copy")
    assert _predictions(tmp_path / "copy") == _predictions(finished)


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(finished: Path, run: Run, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    path = tmp_path / "copy" / "predictions" / "scenes.fog.5.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "nonsense\n", *lines[1:]]))
    with pytest.raises(InputError, match="line 2 is no record") as error:
        run(tmp_path / "copy")
    assert error.value.where == str(path)


def test_more_cells_can_be_added_to_a_finished_evaluation(finished: Path, run: Run, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    run(tmp_path / "copy", corruptions=("fog", "gaussian_noise", "contrast"))
    before, after = _predictions(finished), _predictions(tmp_path / "copy")
    assert after.items() > before.items()
    assert set(after) - set(before) == {"scenes.contrast.1.jsonl", "scenes.contrast.5.jsonl"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"seed": 1}, "seed"), ({"limit": 8}, "limit"), ({"max_new_tokens": 5}, "max_new_tokens")],
)
def test_another_evaluation_in_the_same_folder_is_refused_and_changes_nothing(
    finished: Path, run: Run, changes: dict[str, Any], named: str
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=f"holds another evaluation; it differs in {named}"):
        run(finished, **changes)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_other_weights_other_questions_and_other_pictures_are_other_evaluations(
    finished: Path, run: Run, plan: EvaluationPlan, scenes: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(plan.model, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["projector.0.bias"] += 1
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="model_sha256"):
        run(finished, model=str(tmp_path / "model"))
    records = json.loads((scenes / "test.json").read_text())
    records[0]["conversations"][0]["value"] += "?"
    (tmp_path / "test.json").write_text(json.dumps(records))
    with pytest.raises(InputError, match="items_sha256"):
        run(finished, data=tmp_path / "test.json", image_folder=scenes)
    with pytest.raises(InputError, match="image_folder"):
        run(finished, image_folder=tmp_path)


# Faults.


@pytest.fixture
def damaged(scenes: Path, tmp_path: Path) -> Path:
    """The scenes with one picture cut in half and one gone."""
    folder = tmp_path / "damaged"
    shutil.copytree(scenes, folder)
    first, second = sorted((folder / "images" / "test").glob("*.png"))[:2]
    first.write_bytes(first.read_bytes()[:100])
    second.unlink()
    return folder


def test_an_unreadable_picture_becomes_an_error_record_that_is_no_score_and_changes_the_exit_code(
    damaged: Path, plan: EvaluationPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["--model", plan.model, "--task", "scenes", "--data", str(damaged), "--output", str(output)]
    arguments += ["--max-new-tokens", "3", "--corruption", "fog", "--severity", "2", "--max-errors", "0.2", "--json"]
    for _ in range(2):  # a second start must not forget them
        code, out, lines = _command(*arguments, capsys=capsys)
        assert code == 3
        assert "32 items failed (32 InputError)" in lines[-1]
        assert json.loads(out.splitlines()[-1])["n_errors"] == 32
    for name in ("scenes.none.0.jsonl", "scenes.fog.2.jsonl"):
        failed = [record for record in _records(output, name) if record["error"]]
        assert len(failed) == 16
        for record in failed:
            assert (record["score"], record["prediction"], record["parse_status"]) == (None, None, "error")
            assert record["error"]["type"] == "InputError"
            assert record["image_key"].split("/")[-1] in record["error"]["message"]
    row = _results(output)[0]
    good = [record["score"] for record in _records(output, "scenes.none.0.jsonl") if record["score"] is not None]
    assert (row["n_items"], row["n_errors"], len(good)) == (80, 16, 64)
    assert row["value"] == pytest.approx(np.mean(good))


def test_too_many_errors_leave_no_score_and_say_why(damaged: Path, run: Run, tmp_path: Path) -> None:
    summary = run(tmp_path / "out", data=damaged, limit=None, corruptions=())
    assert summary.headline == {"scenes/none/0": None}
    for row in _results(tmp_path / "out"):
        assert (row["value"], row["ci_low"]) == (None, None)
        assert row["no_score"] == "16 of 80 items failed, more than max_errors (0.01) allows"


def test_the_documented_options_of_the_command(
    plan: EvaluationPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", plan.model, "--task", "scenes", "--data", str(plan.data), "--output", str(tmp_path / "out")]
    arguments += ["--check-batch", "32", "--scoring", "likelihood", "--max-new-tokens", "2", "--limit", "16"]
    code, _, lines = _command(*arguments, capsys=capsys)
    assert code == 0
    said = "scenes: of 16 questions asked alone and in batches of 64, 0 have another answer and 0 another score"
    assert said in lines
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["scoring"], manifest["batch_invariant"]) == ("likelihood", True)


def test_when_every_picture_is_unreadable_there_is_no_score_rather_than_zero(
    scenes: Path, run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(scenes, folder)
    for path in (folder / "images" / "test").glob("*.png"):
        path.write_bytes(b"")
    summary = run(tmp_path / "out", data=folder, corruptions=())
    assert summary.headline == {"scenes/none/0": None}
    assert summary.num_errors == 16
    row = _results(tmp_path / "out")[0]
    assert (row["value"], row["ci_low"], row["ci_high"]) == (None, None, None)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--task", "scnes"], "error: --task: no task 'scnes'; did you mean 'scenes'?"),
        (["--task", "scenes", "--corruption", "fgo"], "error: unknown corruption 'fgo'; did you mean 'fog'?"),
        (["--task", "scenes", "--severity", "6"], "error: --severity: '6' must be numbers from 1 to 5"),
        (["--task", "scenes", "--scoring", "guess"], "error: --scoring: 'guess' is none of generate, likelihood"),
        (["--task", "short_answer"], "error: --data: this task needs a data file"),
        ([], "error: eval: neither a task nor data was given"),
        (["--data", "no_such.json"], "error: no_such.json: does not exist"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2_and_leaves_no_folder(
    plan: EvaluationPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    code, _, lines = _command("--model", plan.model, "--output", str(tmp_path / "out"), *arguments, capsys=capsys)
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith(complaint)
    assert not (tmp_path / "out").exists()


def test_a_missing_model_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tmp_path / "nothing")
    code, _, lines = _command("--model", model, "--task", "scenes", "--output", str(tmp_path / "out"), capsys=capsys)
    assert code == 2
    assert lines == [f"error: {model}: no such model folder. Give the folder of a saved model or run."]


def test_the_summary_is_the_last_line_and_the_report_is_written(
    plan: EvaluationPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["--model", plan.model, "--task", "scenes", "--data", str(plan.data), "--limit", "8"]
    code, out, _ = _command(*arguments, "--output", str(output), "--json", capsys=capsys)
    assert code == 0
    summary = json.loads(out.splitlines()[-1])
    assert summary["results"] == str(output / "results.json")
    assert summary["headline"].keys() == {"scenes/none/0"}
    assert summary["n_errors"] == 0
    assert (output / "report.html").is_file()
    assert "robustness" in json.loads((output / "results.json").read_text())


# Formats of data.


def _png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_table_with_pictures_inside_and_llava_json_give_the_same_answers(run: Run, tmp_path: Path) -> None:
    from datasets import Dataset

    rows: dict[str, list[Any]] = {"id": [], "image": [], "question": [], "answer": [], "type": []}
    records = []
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(_png(number))
        fields = {"id": f"q{number}", "type": "odd" if number % 2 else "even"}
        conversation = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a cat"}]
        records.append({**fields, "image": f"{number}.png", "conversations": conversation})
        values = {
            **fields,
            "image": {"bytes": _png(number), "path": None},
            "question": "What is it?",
            "answer": "a cat",
        }
        for name, value in values.items():
            rows[name].append(value)
    Dataset.from_dict(rows).to_parquet(tmp_path / "data.parquet")
    write_json(tmp_path / "data.json", records)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = []
    for name in ("data.parquet", "data.json", "data.jsonl"):
        run(tmp_path / f"out_{name}", tasks=("short_answer",), data=tmp_path / name, limit=None, corruptions=("fog",))
        output = tmp_path / f"out_{name}"
        records_by_id = {
            (r["item_id"], r["severity"]): (r["prediction"], r["image_sha256"], r["pixels_sha256"], r["group"])
            for cell in _predictions(output)
            for r in _records(output, cell)
        }
        found.append(records_by_id)
        metrics = {row["metric"]: row["n_items"] for row in _results(output) if row["severity"] == 0}
        assert metrics == {"accuracy": 4, "accuracy/even": 2, "accuracy/odd": 2}
    assert len(found[0]) == 12
    assert found[0] == found[1] == found[2]


def test_two_tasks_are_evaluated_side_by_side(run: Run, scenes: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", tasks=("scenes", "short_answer"), data=scenes / "test.json", corruptions=())
    rows = [row for row in _results(tmp_path / "out") if row["metric"] == "accuracy"]
    assert [(row["task"], row["split"]) for row in rows] == [("scenes", "test"), ("short_answer", "data")]
    assert rows[0]["value"] == rows[1]["value"]


def test_a_run_folder_stands_for_its_finished_model(
    run: Run, plan: EvaluationPlan, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(plan.model, tmp_path / "run" / "model")
    write_json(tmp_path / "run" / "model" / "training.json", {"log": []})
    run(tmp_path / "out", model=str(tmp_path / "run"), corruptions=())
    name = "scenes.none.0.jsonl"
    assert _predictions(tmp_path / "out")[name] == _predictions(finished)[name]
    assert json.loads((tmp_path / "out" / "training.json").read_text()) == {"log": []}
