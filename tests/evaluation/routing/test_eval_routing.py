"""`eval --routing`: the same answers, files that survive kills, and results that follow from them."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from symphony_vlm.cli import main
from symphony_vlm.data.scenes import generate_scenes
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.cell import run_cell
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.opening import OpenedModel, open_model
from symphony_vlm.evaluation.processes import Processes
from symphony_vlm.evaluation.records import RecordWriter
from symphony_vlm.evaluation.report import write_report
from symphony_vlm.evaluation.routing.drift import COUNTS, FIGURES
from symphony_vlm.evaluation.routing.run import RoutingRun
from symphony_vlm.evaluation.routing.shards import load_whole, shard_paths
from symphony_vlm.evaluation.runner import EvaluationPlan, evaluate
from symphony_vlm.evaluation.task import get_task

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def plan(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluationPlan:
    """A clean cell of three pictures with eight questions each, and two corrupted ones."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    generate_scenes(folder, train=1, test=3)
    return EvaluationPlan(
        model=str(tiny_model_folder),
        tasks=("scenes",),
        data=folder,
        corruptions=("fog", "contrast"),
        severities=(5,),
        max_new_tokens=4,
        batch_size=16,
        routing=True,
    )


@pytest.fixture(scope="module")
def finished(plan: EvaluationPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted evaluation; tests only read it."""
    output = tmp_path_factory.mktemp("evaluation") / "finished"
    evaluate(plan, output, console=QUIET)
    return output


def _records(output: Path, cell: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "predictions" / f"scenes.{cell}.jsonl").read_text().splitlines()]


def _predictions(output: Path, *, routing: bool = True) -> dict[str, str]:
    """The files' texts without the fields that say when and where, and without the routing if so wished."""
    files = sorted((output / "predictions").glob("*.jsonl"))
    moment = re.compile(r', "seconds": [0-9.e-]+, "rank": \d+}\n')
    texts = {path.name: moment.sub("}\n", path.read_text()) for path in files}
    if routing:
        return texts
    return {name: re.sub(r', "routing": {.*}}\n', "}\n", text) for name, text in texts.items()}


def _drift(output: Path) -> dict[str, Any]:
    (block,) = json.loads((output / "results.json").read_text())["robustness"]["routing_drift"]
    assert isinstance(block, dict)
    return block


def test_answers_and_results_are_those_of_an_evaluation_without_routing(
    plan: EvaluationPlan, finished: Path, tmp_path: Path
) -> None:
    evaluate(dataclasses.replace(plan, routing=False), tmp_path, console=QUIET)
    assert _predictions(finished, routing=False) == _predictions(tmp_path)
    assert not (tmp_path / "routing").exists()
    with_, without = (json.loads((folder / "results.json").read_text()) for folder in (finished, tmp_path))
    assert with_["results"] == without["results"]
    assert "robustness" not in without
    assert len({record["prediction"] for record in _records(finished, "none.0")}) > 3


def test_answers_by_likelihood_are_the_same_too(plan: EvaluationPlan, tmp_path: Path) -> None:
    data = tmp_path / "choices.json"
    scenes = plan.data
    assert scenes is not None
    images = sorted((scenes / "images" / "test").iterdir())[:3]
    rows = [
        {"id": str(n), "image": str(image), "question": "Which?", "choices": ["red", "a blue one"], "answer": "A"}
        for n, image in enumerate(images)
    ]
    data.write_text(json.dumps(rows))
    choices = dataclasses.replace(
        plan, tasks=("multiple_choice",), data=data, corruptions=("fog",), scoring="likelihood"
    )
    evaluate(choices, tmp_path / "with", console=QUIET)
    evaluate(dataclasses.replace(choices, routing=False), tmp_path / "without", console=QUIET)
    assert _predictions(tmp_path / "with", routing=False) == _predictions(tmp_path / "without")
    assert _drift(tmp_path / "with")["cells"][0]["n_items"] == 3


def test_a_record_says_what_its_routing_was_and_how_far_it_drifted(finished: Path) -> None:
    for record in _records(finished, "none.0"):
        routing = record["routing"]
        assert routing["image"]["tokens"] + routing["text"]["tokens"] == record["n_prompt_tokens"]
        assert 0 < routing["image"]["entropy"] <= np.log(4) + 1e-6
    for record in _records(finished, "fog.5"):
        routing = record["routing"]
        assert routing.pop("comparable") is True
        numbers = [value for kind in ("image", "text") for value in routing[kind].values()]
        assert len(numbers) == 10 and all(isinstance(value, float) for value in numbers)
    assert any(record["routing"]["image"]["fluctuation"] > 0 for record in _records(finished, "fog.5"))


def test_results_have_counts_that_add_up_and_figures_with_intervals(finished: Path) -> None:
    block = _drift(finished)
    assert block["router"] == "symphony_smoe" and block["layers"] == ["0", "1"] and block["expert_graph"]
    assert [(cell["corruption"], cell["severity"]) for cell in block["cells"]] == [("fog", 5), ("contrast", 5)]
    records = {record["item_id"]: record for record in _records(finished, "none.0")}
    for cell in block["cells"]:
        assert cell["n_items"] == len(records) and cell["n_not_comparable"] == 0 and cell["n_images"] == 3
        for kind in ("image", "text"):
            tokens = sum(record["routing"][kind]["tokens"] for record in records.values())
            for layer in block["layers"]:
                counts = cell["counts"][layer][kind]
                assert counts.keys() == COUNTS.keys()
                assert counts["tokens"] == tokens == sum(counts["shared"]) == sum(counts["shared_plain"])
                assert sum(counts["load_clean"]) == sum(counts["load_corrupted"]) == 2 * tokens
                figures = cell["layers"][layer][kind]
                assert figures.keys() == FIGURES.keys()
                overlap = sum(n * count for n, count in enumerate(counts["shared"])) / 2 / tokens
                assert figures["fluctuation"]["value"] == pytest.approx(1 - overlap)
                assert figures["top1_change"]["value"] == counts["top1_changed"] / tokens
                for name, number in figures.items():
                    # Ends are quantiles of numbers kept in fp32.
                    margin = 1e-6 * (1 + abs(number["value"] or 0))
                    if number["value"] is not None and not name.startswith(("dead", "load_cv", "js_load")):
                        assert number["ci_low"] - margin <= number["value"] <= number["ci_high"] + margin, name
    assert block["mean"]["all"]["image"]["fluctuation"]["value"] == pytest.approx(
        np.mean([cell["layers"]["all"]["image"]["fluctuation"]["value"] for cell in block["cells"]])
    )


def test_the_stored_drift_of_an_item_is_what_its_record_says(finished: Path) -> None:
    items, arrays = load_whole(finished / "routing", "scenes.fog.5")
    assert sorted(items) == [record["item_id"] for record in _records(finished, "fog.5")]
    records = {record["item_id"]: record["routing"] for record in _records(finished, "fog.5")}
    for row, item in enumerate(items):
        shared = arrays["shared"][row, :, 0]
        fluctuation = (1 - (shared @ [0, 1, 2]) / 2 / shared.sum(-1)).mean()
        assert records[item]["image"]["fluctuation"] == pytest.approx(fluctuation, abs=1e-6)


def test_patches_of_samples_are_those_of_the_picture(finished: Path) -> None:
    (samples,) = json.loads((finished / "routing" / "samples.json").read_text()).values()
    assert {sample["corruption"] for sample in samples} == {"fog", "contrast"}
    for sample in samples:
        assert sample["grid"] == 4 and len(sample["changed"]) == 16
        found = next(r for r in _records(finished, f"{sample['corruption']}.5") if r["item_id"] == sample["item_id"])
        assert np.mean(sample["changed"]) == pytest.approx(found["routing"]["image"]["fluctuation"], abs=1e-4)


def test_another_start_answers_nothing_and_finds_the_same(plan: EvaluationPlan, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "routing").iterdir()}
    evaluate(plan, tmp_path / "out", console=QUIET)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "routing").iterdir()} == before
    assert _drift(tmp_path / "out") == _drift(finished)
    assert _predictions(tmp_path / "out") == _predictions(finished)


@pytest.fixture(scope="module")
def single(plan: EvaluationPlan) -> EvaluationPlan:
    """One picture, clean and in fog, its questions one by one, so that rounding does not depend on the others."""
    return dataclasses.replace(plan, batch_size=1, limit=8, corruptions=("fog",), max_new_tokens=2)


@pytest.fixture(scope="module")
def single_finished(single: EvaluationPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted evaluation of it; tests only read it."""
    output = tmp_path_factory.mktemp("evaluation") / "single"
    evaluate(single, output, console=QUIET)
    return output


@pytest.mark.parametrize("last", [3, 12])
def test_an_interruption_changes_nothing(
    single: EvaluationPlan, single_finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    """Killed when an item's routing is written and its record is not, in the clean cell or in the corrupted one."""
    original, count = RecordWriter.write, 0

    def write(self: RecordWriter, records: Any) -> None:
        nonlocal count
        count += 1
        if count > last:
            raise KeyboardInterrupt
        original(self, records)

    monkeypatch.setattr(RecordWriter, "write", write)
    with pytest.raises(KeyboardInterrupt):
        evaluate(single, tmp_path, console=QUIET)
    monkeypatch.setattr(RecordWriter, "write", original)
    evaluate(single, tmp_path, console=QUIET)
    assert _predictions(tmp_path) == _predictions(single_finished)
    assert _drift(tmp_path) == _drift(single_finished)


def test_an_evaluation_started_without_routing_gains_it(plan: EvaluationPlan, finished: Path, tmp_path: Path) -> None:
    evaluate(dataclasses.replace(plan, routing=False), tmp_path, console=QUIET)
    evaluate(plan, tmp_path, console=QUIET)
    assert _predictions(tmp_path) == _predictions(finished)
    assert _drift(tmp_path) == _drift(finished)


def test_an_item_whose_routing_is_lost_is_answered_again(plan: EvaluationPlan, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    shard_paths(output / "routing", "scenes.clean")[0].unlink()
    (output / "routing" / "scenes.fog.5.all.safetensors").unlink()
    evaluate(plan, output, console=QUIET)
    assert _predictions(output) == _predictions(finished)
    assert _drift(output) == _drift(finished)


def test_processes_of_any_number_find_the_same(plan: EvaluationPlan, tmp_path: Path) -> None:
    """Two processes, one after the other; one by one, so that rounding does not depend on who else is in the batch."""
    model, task = open_model(plan.model), get_task("scenes")
    items = list(task.load(plan.data, None, tmp_path, 0))[::4]
    assert {Processes(rank=0, size=2).owns(item) for item in items} == {True, False}
    for size in (1, 2):
        output = tmp_path / str(size)
        for cell in (Cell(task=task, corruption=c, severity=s, seed=0) for c, s in (("none", 0), ("fog", 5))):
            for rank in reversed(range(size)):
                _run(model, cell, items, output, Processes(rank=rank, size=size))
    cells = [Cell(task=task, corruption=c, severity=s, seed=0) for c, s in (("none", 0), ("fog", 5))]
    found = [
        RoutingRun(model, tmp_path / str(size), 0).results(cells, {"scenes": items}, "m", seed=0) for size in (1, 2)
    ]
    assert found[0] == found[1]
    assert found[0]["routing_drift"][0]["cells"][0]["n_items"] == len(items)
    assert len(shard_paths(tmp_path / "2" / "routing", "scenes.clean")) == len(items)


def _run(model: OpenedModel, cell: Cell, items: Any, output: Path, processes: Processes) -> None:
    routing = RoutingRun(model, output, processes.rank)
    predictor = routing.of_cell(cell).predictor(batch_size=1, max_new_tokens=2)
    path = output / "predictions" / cell.file_name
    run_cell(cell, items, predictor, path, lambda done: None, batch_size=1, processes=processes)
    if processes.first:
        routing.finish(cell, [item.id for item in items])


def test_items_that_fail_clean_and_prompts_of_other_length_are_counted_not_compared(
    plan: EvaluationPlan, tmp_path: Path
) -> None:
    model, task = open_model(plan.model), get_task("scenes")
    items = list(task.load(plan.data, None, tmp_path, 0))[:16]
    clean = Cell(task=task, corruption="none", severity=0, seed=0)
    fog = Cell(task=task, corruption="fog", severity=5, seed=0)
    longer = [dataclasses.replace(items[0], question=items[0].question + " Really?"), *items[1:]]
    _run(model, clean, items[:15], tmp_path, Processes(rank=0, size=1))
    path = tmp_path / "predictions" / clean.file_name
    failed = _records(tmp_path, "none.0")[0] | {"item_id": items[15].id, "prediction": None, "score": None}
    path.write_text(path.read_text() + json.dumps(failed | {"error": {"type": "ValueError", "message": ""}}) + "\n")
    _run(model, fog, longer, tmp_path, Processes(rank=0, size=1))
    by_id = {record["item_id"]: record["routing"] for record in _records(tmp_path, "fog.5")}
    assert by_id[items[0].id]["comparable"] is False
    assert re.fullmatch(r"\d+ tokens clean, \d+ corrupted", by_id[items[0].id]["reason"])
    assert by_id[items[15].id] == {
        "comparable": False,
        "reason": "the clean prompt has no routing, for the item failed",
    }
    routing = RoutingRun(model, tmp_path, 0)
    (block,) = routing.results([clean, fog], {"scenes": items}, "m", seed=0)["routing_drift"]
    assert (block["cells"][0]["n_items"], block["cells"][0]["n_not_comparable"]) == (14, 2)
    routing.forget_unrouted([clean, fog])
    assert len(_records(tmp_path, "fog.5")) == 16, "what cannot be compared is not asked again and again"


def test_a_dense_model_gets_a_note_and_a_stock_model_an_error(plan: EvaluationPlan, tmp_path: Path) -> None:
    for router, is_stock in (("dense", False), ("llava", True)):
        model = OpenedModel(model=None, processor=None, router=router, is_stock=is_stock)
        console = Console(file=io.StringIO(), width=200)
        if is_stock:
            with pytest.raises(InputError, match="model of transformers has no routers") as e:
                RoutingRun.of(plan, model, tmp_path, 0, console)
            assert e.value.where == "--routing"
        else:
            assert RoutingRun.of(plan, model, tmp_path, 0, console) is None
            assert "the model is dense" in console.file.getvalue()  # type: ignore[attr-defined]
    assert RoutingRun.of(dataclasses.replace(plan, routing=False), model, tmp_path, 0, QUIET) is None


def test_a_dense_model_is_evaluated_as_without_the_option(
    plan: EvaluationPlan, tiny_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model.save_pretrained(tmp_path / "dense")
    tiny_model.processor.save_pretrained(tmp_path / "dense")
    arguments = ["--model", str(tmp_path / "dense"), "--task", "scenes", "--data", str(plan.data), "--limit", "8"]
    with pytest.raises(SystemExit) as stop:
        main(["eval", *arguments, "--max-new-tokens", "2", "--routing", "--output", str(tmp_path / "out")])
    assert not stop.value.code
    assert "the model is dense, so there is no routing to record" in capsys.readouterr().err
    assert not (tmp_path / "out" / "routing").exists()


def test_the_report_has_a_section_and_tables_of_one_model_and_of_several(
    plan: EvaluationPlan, finished: Path, tmp_path: Path
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    shutil.copytree(finished, one)
    page = write_report([one], one).read_text()
    assert '<section id="routing"><h2>Inside the routers</h2>' in page
    assert page.count('<g style="filter:grayscale(1)">') == 2
    assert _drift(one) == _drift(finished), "the report keeps what the evaluation has found"
    for name in ("tables.md", "tables.tex"):
        text = (one / name).read_text()
        assert "Drift by layer, image positions" in text and "The expert graph's part" in text
    shutil.copytree(finished, other)
    document = json.loads((other / "results.json").read_text())
    text = json.dumps(document).replace('"symphony_smoe"', '"smoe"')
    (other / "results.json").write_text(text)
    merged = json.loads((write_report([other, one], tmp_path / "both").parent / "results.json").read_text())
    assert [block["label"] for block in merged["robustness"]["routing_drift"]] == ["smoe", "symphony_smoe"]


def test_attacks_have_a_table_of_their_own(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "out")
    path = tmp_path / "out" / "results.json"
    document = json.loads(path.read_text())
    fog, contrast = document["robustness"]["routing_drift"][0]["cells"]
    fog |= {"corruption": "none", "severity": 0, "attack": "pgd 4/255"}
    contrast |= {"attack": "word_swap 0.2", "layers": None, "n_items": 0, "n_not_comparable": 24}
    path.write_text(json.dumps(document))
    text = (write_report([tmp_path / "out"], tmp_path / "report").parent / "tables.md").read_text()
    value = 100 * fog["layers"]["all"]["image"]["fluctuation"]["value"]
    assert re.search(rf"\| pgd 4/255 \| {value:.1f} \[.*\] \| .* \| 24 \| 0 \|", text)
    assert "| word\\_swap 0.2, contrast 5 | – | – | 0 | 24 |" in text


def test_a_spoilt_block_is_an_error_that_names_the_file(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "out")
    path = tmp_path / "out" / "results.json"
    document = json.loads(path.read_text())
    document["robustness"]["routing_drift"] = [{"cells": []}, 3]
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="'routing_drift' is not a list of blocks") as e:
        write_report([tmp_path / "out"], tmp_path / "report")
    assert e.value.where == str(path)
