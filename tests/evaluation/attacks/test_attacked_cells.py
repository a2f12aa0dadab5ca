"""Attacks as cells of an evaluation: files, records, rows, resuming, and what the report makes of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
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
from symphony_vlm.evaluation.attacks.catalogue import parse_attacks
from symphony_vlm.evaluation.cell import run_cell
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.opening import open_model
from symphony_vlm.evaluation.predictor import Predictor
from symphony_vlm.evaluation.processes import Processes
from symphony_vlm.evaluation.runner import EvaluationPlan, EvaluationSummary, evaluate
from symphony_vlm.evaluation.task import get_task

Run = Callable[..., EvaluationSummary]
ATTACKS = "word_swap:0.3,typographic,option_permutation,pgd:8/255:2"


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures with two multiple choices each, one of them with options that refer to others."""
    folder = tmp_path_factory.mktemp("choices")
    rows = []
    rng = np.random.default_rng(0)
    for picture in range(4):
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(folder / f"{picture}.png")
        for number, options in enumerate((["red", "green", "blue"], ["red", "all of the above"])):
            question, answer = "<image>\nWhich colour is the circle?", ("A", "B")[picture % 2]
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            row = {"id": f"{picture}-{number}", "image": f"{picture}.png", "conversations": turns}
            rows.append(row | {"choices": options})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


@pytest.fixture(scope="module")
def run(tiny_model_folder: Path, choices: Path) -> Run:
    plan = EvaluationPlan(
        model=str(tiny_model_folder),
        tasks=("multiple_choice",),
        data=choices,
        image_folder=choices.parent,
        attacks=parse_attacks(ATTACKS),
        max_new_tokens=2,
        batch_size=4,
    )

    def evaluate_changed(output: Path, **changes: Any) -> EvaluationSummary:
        return evaluate(dataclasses.replace(plan, **changes), output, console=Console(quiet=True))

    return evaluate_changed


@pytest.fixture(scope="module")
def finished(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("evaluation") / "finished"
    run(output, corruptions=("fog",), severities=(3,))
    return output


def _records(output: Path, attack: str, cell: str = "none.0") -> dict[str, dict[str, Any]]:
    name = f"multiple_choice.{cell}{'.' + attack if attack else ''}.jsonl"
    return {r["item_id"]: r for r in map(json.loads, (output / "predictions" / name).read_text().splitlines())}


def _texts(output: Path) -> dict[str, str]:
    files = sorted((output / "predictions").glob("*.jsonl"))
    return {path.name: re.sub(r', "seconds": [0-9.e-]+, "rank": \d+', "", path.read_text()) for path in files}


def test_cells_are_corruptions_times_attacks_and_each_has_a_file_of_its_own(finished: Path) -> None:
    attacks = ["", ".option_permutation", ".pgd_8-255_2", ".typographic", ".word_swap_0.3"]
    expected = {f"multiple_choice.{cell}{attack}.jsonl" for cell in ("none.0", "fog.3") for attack in attacks}
    assert {path.name for path in (finished / "predictions").glob("*.jsonl")} == expected
    rows = json.loads((finished / "results.json").read_text())["results"]
    cells = {(row["corruption"], row["severity"], row["attack"]) for row in rows}
    specs = ["none", "word_swap:0.3", "typographic", "option_permutation", "pgd:8/255:2"]
    assert cells == {(name, severity, spec) for name, severity in (("none", 0), ("fog", 3)) for spec in specs}


def test_records_say_what_was_done_and_budget_and_seed_are_in_the_manifest(finished: Path) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["seed"] == 0
    assert set(manifest["attacks"]) == {"word_swap:0.3", "typographic", "option_permutation", "pgd:8/255:2"}
    assert manifest["attacks"]["pgd:8/255:2"]["eps"] == pytest.approx(8 / 255)
    assert len(manifest["attacks"]["word_swap:0.3"]["stop_words_sha256"]) == 64
    clean = _records(finished, "")
    swapped = _records(finished, "word_swap_0.3")["0-0"]
    # Six words, one of them two stop words: int(0.3 x 5) = 1 of three eligible ones.
    assert swapped["attack"] == "word_swap:0.3"
    assert swapped["question"].count("AAA") == swapped["attack_facts"]["n_swapped"] == 1
    assert swapped["question"].endswith(
        "\nA. red\nB. green\nC. blue\nAnswer with the option's letter from the given choices directly."
    )
    assert swapped["pixels_sha256"] == clean["0-0"]["pixels_sha256"]
    assert swapped["prompt_sha256"] != clean["0-0"]["prompt_sha256"]
    written = _records(finished, "typographic")["0-0"]
    assert written["attack_facts"]["text"] in {"green", "blue"}
    assert written["pixels_sha256"] != clean["0-0"]["pixels_sha256"]
    assert written["image_sha256"] == clean["0-0"]["image_sha256"]
    attacked = _records(finished, "pgd_8-255_2")["0-0"]["attack_facts"]
    assert attacked["loss"] > attacked["loss_clean"]
    assert attacked["rounded_score"] in (0.0, 1.0)
    permuted = _records(finished, "option_permutation")["0-0"]
    assert permuted["attack_facts"]["n_orders"] == 6
    assert len(permuted["attack_facts"]["contents"]) == 6


def test_a_corrupted_picture_is_attacked_after_its_corruption(finished: Path) -> None:
    foggy, both = _records(finished, "", "fog.3"), _records(finished, "pgd_8-255_2", "fog.3")
    assert {r["pixels_sha256"] for r in foggy.values()} == {r["pixels_sha256"] for r in both.values()}
    assert (
        both["0-0"]["attack_facts"]["loss_clean"]
        != _records(finished, "pgd_8-255_2")["0-0"]["attack_facts"]["loss_clean"]
    )
    assert (both["0-0"]["corruption"], both["0-0"]["severity"], both["0-0"]["attack"]) == ("fog", 3, "pgd:8/255:2")


def test_the_unattacked_cells_are_those_of_an_evaluation_without_attacks(
    finished: Path, run: Run, tmp_path: Path
) -> None:
    run(tmp_path, corruptions=("fog",), severities=(3,), attacks=())
    plain = _texts(tmp_path)
    assert plain == {name: text for name, text in _texts(finished).items() if name in plain}
    assert "attacks" not in json.loads((tmp_path / "manifest.json").read_text())
    # Attacks may be added later, as corruptions may; the folder then is the same as one that had them from the start.
    run(tmp_path, corruptions=("fog",), severities=(3,))
    assert _texts(tmp_path) == _texts(finished)


@pytest.mark.parametrize("attack", ["pgd:8/255:2", "option_permutation"])
def test_a_killed_attack_goes_on_where_it_stopped(
    attack: str, finished: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = cell_module.answer_attacked
    batches: list[int] = []

    class Killed(BaseException):
        pass

    def kill_at_third(*arguments: Any, **more: Any) -> Any:
        batches.append(len(arguments[3]))
        if len(batches) == 3:
            raise Killed
        return whole(*arguments, **more)

    monkeypatch.setattr(cell_module, "answer_attacked", kill_at_third)
    with pytest.raises(Killed):
        run(tmp_path, attacks=parse_attacks(attack), batch_size=2)
    name = f"multiple_choice.none.0.{attack.replace('/', '-').replace(':', '_')}.jsonl"
    path = tmp_path / "predictions" / name
    assert len(path.read_text().splitlines()) == 4
    with path.open("a") as file:
        file.write('{"item_id": "torn')
    batches.clear()
    monkeypatch.setattr(
        cell_module,
        "answer_attacked",
        lambda *arguments, **more: batches.append(len(arguments[3])) or whole(*arguments, **more),
    )
    run(tmp_path, attacks=parse_attacks(attack), batch_size=2)
    assert sum(batches) == 4, "what was answered is not attacked again"
    assert _texts(tmp_path)[name] == _texts(finished)[name], "batches of two give what batches of four gave"


def test_pictures_are_encoded_once_for_all_orders_of_all_their_questions(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = Predictor.encode_images
    monkeypatch.setattr(
        Predictor, "encode_images", lambda self, images: encoded.append(len(images)) or encode(self, images)
    )
    run(tmp_path, attacks=parse_attacks("option_permutation"))
    assert sum(encoded) == 4 + 4, "four pictures in the clean cell, and four in the attacked one"


def test_rows_of_the_permutation_leave_referring_options_apart(finished: Path) -> None:
    document = json.loads((finished / "results.json").read_text())
    rows = {
        row["metric"]: row
        for row in document["results"]
        if (row["attack"], row["corruption"]) == ("option_permutation", "none")
    }
    records = _records(finished, "option_permutation")
    plain = [r for r in records.values() if not r["attack_facts"]["refers_to_others"]]
    assert {r["item_id"] for r in plain} == {f"{n}-0" for n in range(4)}
    assert rows["worst_case"]["value"] == np.mean([r["score"] for r in plain])
    assert rows["mean_over_orders"]["value"] == pytest.approx(np.mean([r["attack_facts"]["mean_score"] for r in plain]))
    assert rows["consistency"]["value"] == np.mean([r["attack_facts"]["consistent"] for r in plain])
    assert (rows["worst_case"]["n_items"], rows["worst_case_referring"]["n_items"]) == (4, 4)
    assert rows["accuracy"]["value"] == np.mean([r["score"] for r in records.values()])
    letters = [rows[f"gold_at_{letter}"]["value"] for letter in "ABC"]
    assert np.mean(letters) == pytest.approx(rows["mean_over_orders"]["value"])
    biases = {entry["corruption"]: entry["letter_bias"] for entry in document["attacks"]}
    assert biases["none"]["asked"] == {"A": 8, "B": 8, "C": 8}


def test_items_that_cannot_be_attacked_are_not_in_the_cell(run: Run, choices: Path, tmp_path: Path) -> None:
    rows = json.loads(choices.read_text())
    rows[0]["choices"] = ["red", "", "blue"]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows))
    run(tmp_path / "out", data=data, attacks=parse_attacks("option_permutation"))
    assert set(_records(tmp_path / "out", "")) - set(_records(tmp_path / "out", "option_permutation")) == {"0-0"}


def test_a_task_without_anything_to_attack_is_refused(run: Run, tmp_path: Path) -> None:
    generate_scenes(tmp_path / "scenes", train=1, test=2)
    with pytest.raises(InputError, match="none of its .* items can be attacked by option_permutation"):
        run(tmp_path / "out", tasks=("scenes",), data=tmp_path / "scenes", attacks=parse_attacks("option_permutation"))


def test_another_meaning_of_the_same_name_is_refused(finished: Path, run: Run, tmp_path: Path) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    manifest["attacks"]["word_swap:0.3"]["stop_words_sha256"] = "0" * 64
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="word_swap:0.3 was another attack"):
        run(tmp_path)


def test_the_command_takes_attacks_and_refuses_bad_budgets(
    tiny_model_folder: Path, choices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--model", str(tiny_model_folder), "--data", str(choices), "--image-folder", str(choices.parent)]
    more = ["--task", "multiple_choice", "--output", str(tmp_path), "--max-new-tokens", "2", "--limit", "2"]
    with pytest.raises(SystemExit) as stop:
        main(["eval", *where, *more, "--attack", "pgd:9"])
    assert stop.value.code == 2
    assert "the eps is '9'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["eval", *where, *more, "--attack", "word_swap:0.5", "--json"])
    assert not stop.value.code
    headline = json.loads(capsys.readouterr().out)["headline"]
    assert set(headline) == {"multiple_choice/none/0", "multiple_choice/none/0/word_swap:0.5"}


@pytest.mark.parametrize("spec", ["typographic", "pgd:8/255:2"])
def test_two_processes_write_what_one_writes(
    spec: str, run: Run, choices: Path, finished: Path, tmp_path: Path
) -> None:
    task = get_task("multiple_choice")
    items = task.load(choices, choices.parent, tmp_path, 0)
    attack = parse_attacks(spec)[0].prepared(items)
    cell = Cell(task=task, corruption="none", severity=0, seed=0, attack=attack.spec)
    model = open_model(str(json.loads((finished / "manifest.json").read_text())["model"]))
    path = tmp_path / cell.file_name
    for rank in (1, 0):
        predictor = model.predictor(batch_size=3, max_new_tokens=2)
        processes = Processes(rank=rank, size=2)
        run_cell(cell, items, predictor, path, lambda done: None, batch_size=3, processes=processes, attack=attack)
    found = re.sub(r', "seconds": [0-9.e-]+, "rank": \d+', "", path.read_text())
    assert found == _texts(finished)[cell.file_name]


def test_models_of_transformers_are_attacked_but_for_gradients(choices: Path, run: Run, tmp_path: Path) -> None:
    path = Path(__file__).resolve().parents[1] / "stock_models.py"
    spec = importlib.util.spec_from_file_location("stock_models", path)
    assert spec is not None and spec.loader is not None
    stock_models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stock_models)
    folder = str(stock_models.llava(tmp_path / "llava"))
    with pytest.raises(InputError, match="needs the gradient at the pixels.*llava"):
        run(tmp_path / "out", model=folder, attacks=parse_attacks("pgd"))
    run(tmp_path / "out", model=folder, attacks=parse_attacks("option_permutation,typographic,word_swap:0.3"))
    for attack in ("option_permutation", "typographic", "word_swap_0.3"):
        records = _records(tmp_path / "out", attack)
        assert all(record["error"] is None for record in records.values())
        assert len(records) == 8
