"""Several models in one evaluation find what each finds alone, and look at each picture once."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from symphony_vlm.cli import main
from symphony_vlm.data.scenes import generate_scenes
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation import cell as cell_module
from symphony_vlm.evaluation import pictures as pictures_module
from symphony_vlm.evaluation.answer import Answer
from symphony_vlm.evaluation.opening import open_model
from symphony_vlm.evaluation.predictor import Predictor
from symphony_vlm.evaluation.processes import Processes
from symphony_vlm.evaluation.runner import EvaluationPlan, evaluate
from symphony_vlm.evaluation.sharing import SharedEncoder, share_encoders
from symphony_vlm.evaluation.sweep import evaluate_models, model_labels
from symphony_vlm.model.vision import VisionTower
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
from symphony_vlm.moe.configuration import MoEConfig

# The tests' folders are no packages.
_spec = importlib.util.spec_from_file_location("stock_models", Path(__file__).with_name("stock_models.py"))
assert _spec is not None and _spec.loader is not None
stock_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stock_models)

Make = Callable[..., SymphonyVLMForConditionalGeneration]
QUIET = Console(quiet=True)
ROOT = Path(__file__).resolve().parents[2]
N_PICTURES, N_CELLS = 3, 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_model_factory: Make) -> dict[str, str]:
    """By label: two with one tower and other weights behind it, one with another tower, one with experts in it."""
    folder, make = tmp_path_factory.mktemp("models"), tiny_model_factory
    moe = MoEConfig(num_experts=4, router="smoe")
    experts = MoEConfig(num_experts=2, router="smoe", modules=("vision",))
    made = {
        "first": make(moe=moe),
        "second": make(moe=moe),
        "tower": make(moe=moe, seed=1),
        "experts": make(moe=experts),
    }
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for label in ("second", "experts"):
            for weight in (*made[label].projector.parameters(), *made[label].language_model.parameters()):
                weight += 0.3 * weight.std().nan_to_num(0.1) * torch.randn(weight.shape, generator=generator)
    for label, model in made.items():
        model.save_pretrained(folder / label / "model")
        assert model.processor is not None
        model.processor.save_pretrained(folder / label / "model")
    paths = {label: str(folder / label / "model") for label in made}
    return paths | {"stock": str(stock_models.llava(folder / "stock"))}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> EvaluationPlan:
    """Two cells of three pictures with eight questions each."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    generate_scenes(folder, train=1, test=N_PICTURES)
    return EvaluationPlan(
        model="none",
        tasks=("scenes",),
        data=folder,
        corruptions=("gaussian_noise",),
        severities=(5,),
        max_new_tokens=3,
        batch_size=16,
    )


@pytest.fixture(scope="module")
def alone(plan: EvaluationPlan, models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model evaluated by itself; tests only read it."""
    folder = tmp_path_factory.mktemp("alone")
    for label, model in models.items():
        evaluate(dataclasses.replace(plan, model=model), folder / label, console=QUIET)
    return {label: folder / label for label in models}


def _predictions(output: Path) -> dict[str, str]:
    """The files' texts without the two fields that say when and where."""
    files = sorted((output / "predictions").glob("*.jsonl"))
    return {path.name: re.sub(r', "seconds": [0-9.e-]+, "rank": \d+}\n', "}\n", path.read_text()) for path in files}


def _results(output: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((output / "results.json").read_text())
    return {name: document[name] for name in ("results", "baselines")}


def _manifest(output: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((output / "manifest.json").read_text())
    return manifest


def _assert_equal(output: Path, expected: Path) -> None:
    assert _predictions(output) == _predictions(expected)
    assert _results(output) == _results(expected)
    assert _manifest(output) == _manifest(expected)


def _log() -> Console:
    return Console(file=io.StringIO(), width=200)


def _said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_models_together_find_what_each_finds_alone(
    plan: EvaluationPlan, models: dict[str, str], alone: dict[str, Path], tmp_path: Path
) -> None:
    """All kinds at once: a shared tower, another tower, experts in the tower, a model of transformers."""
    console = _log()
    evaluate_models(plan, list(models.values()), tmp_path, console=console)
    for label in models:
        _assert_equal(tmp_path / label, alone[label])
    said = _said(console)
    assert "first, second: one vision tower, whose features they share\n" in said
    alone_says = "shares the pictures and encodes them itself"
    assert f"tower: {alone_says} (no other has its vision tower, settings and image processor)\n" in said
    assert f"experts: {alone_says} (its vision tower has experts)\n" in said
    assert f"stock: {alone_says} (a model of transformers)\n" in said
    answers = {label: "".join(_predictions(path).values()) for label, path in alone.items()}
    assert len(set(answers.values())) == len(models), "equal answers of all models would show nothing"


def test_each_picture_is_opened_corrupted_and_encoded_once_a_cell(
    plan: EvaluationPlan, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: Counter[tuple[str, int]] = Counter()
    encoded: list[int] = []
    open_picture, forward = pictures_module.open_picture, VisionTower.forward

    def counted_open(ref: Any, cell: Any, model: Any) -> Any:
        opened[str(ref.path), cell.severity] += 1
        return open_picture(ref, cell, model)

    def counted_forward(self: VisionTower, pixels: torch.Tensor) -> torch.Tensor:
        if not pixels.is_meta:  # a new tower measures itself
            encoded.append(len(pixels))
        return forward(self, pixels)

    monkeypatch.setattr(pictures_module, "open_picture", counted_open)
    monkeypatch.setattr(VisionTower, "forward", counted_forward)
    evaluate_models(plan, [models["first"], models["second"]], tmp_path / "shared", console=QUIET)
    assert len(opened) == N_PICTURES * N_CELLS and set(opened.values()) == {1}
    assert sum(encoded) == N_PICTURES * N_CELLS
    opened.clear()
    encoded.clear()
    evaluate_models(plan, [models["first"], models["tower"]], tmp_path / "apart", console=QUIET)
    assert set(opened.values()) == {1}, "pictures are shared whatever the towers"
    assert sum(encoded) == 2 * N_PICTURES * N_CELLS


def test_memory_holds_one_chunk_of_pictures(
    plan: EvaluationPlan, models: dict[str, str], alone: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(cell_module, "IMAGES_AT_ONCE", 1)
    held: list[int] = []
    original = Predictor.answer

    def answer(self: Predictor, items: Any, features: Any) -> list[Answer]:
        encoder: Any = self._encoder
        held.append(len(encoder._features))
        return original(self, items, features)

    monkeypatch.setattr(Predictor, "answer", answer)
    evaluate_models(plan, [models["first"], models["second"]], tmp_path, console=QUIET)
    assert set(held) == {1}
    for label in ("first", "second"):
        assert _predictions(tmp_path / label) == _predictions(alone[label])


@pytest.mark.parametrize("resize_mode", ["pad", "anyres"])
def test_shared_features_are_those_of_the_model_to_the_bit(tiny_model_factory: Make, resize_mode: str) -> None:
    """In one batch, and where some of the pictures have been encoded before."""
    model = tiny_model_factory(resize_mode=resize_mode)
    numbers = np.random.default_rng(0)
    images = [numbers.integers(0, 256, (20 + 30 * i, 50, 3), dtype=np.uint8) for i in range(4)]
    encoder = SharedEncoder(model, batch_size=8)
    mine = Predictor(model, batch_size=8, max_new_tokens=1)
    other = Predictor(model, batch_size=8, max_new_tokens=1, encoder=encoder)
    for _ in range(2):
        expected, found = mine.encode_images(images), other.encode_images(images)
        assert [len(image) for image in found] == [len(image) for image in expected]
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    encoder.features(images[1:3])
    assert encoder.num_encoded == 4
    encoder.forget()
    encoder.features([images[0], images[0]])
    assert encoder.num_encoded == 5, "equal pixels are one picture"


def test_a_tower_is_shared_only_if_all_that_its_features_depend_on_is_equal(models: dict[str, str]) -> None:
    def shared(change: Callable[[Any], None]) -> bool:
        opened = [open_model(models["first"], device="cpu"), open_model(models["second"], device="cpu")]
        change(opened[1])
        found = share_encoders(opened, ["a", "b"], batch_size=4, console=QUIET)
        assert found[0] is found[1]
        return found[0] is not None

    def one_weight(opened: Any) -> None:
        with torch.no_grad():
            next(opened.model.vision_tower.parameters()).view(-1)[0] += 1e-6

    assert shared(lambda opened: None)
    assert not shared(one_weight)
    assert not shared(lambda opened: opened.model.vision_tower.double())
    assert not shared(lambda opened: setattr(opened.processor.image_processor, "resize_mode", "crop"))
    assert not shared(lambda opened: setattr(opened.processor.image_processor, "image_mean", [0.5, 0.5, 0.5]))


def _asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []
    original = Predictor.answer

    def answer(self: Predictor, items: Any, features: Any) -> list[Answer]:
        asked.extend(item.id for item in items)
        return original(self, items, features)

    monkeypatch.setattr(Predictor, "answer", answer)
    return asked


def test_each_model_continues_where_it_was(
    plan: EvaluationPlan, models: dict[str, str], alone: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    """One has finished alone; of the other a cell is missing, and of the other cell half of the lines."""
    shutil.copytree(alone["first"], tmp_path / "first")
    shutil.copytree(alone["second"], tmp_path / "second")
    folder = tmp_path / "second" / "predictions"
    (folder / "scenes.gaussian_noise.5.jsonl").unlink()
    path = folder / "scenes.none.0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:10]) + lines[10][:40])
    asked = _asked(monkeypatch)
    evaluate_models(plan, [models["first"], models["second"]], tmp_path, console=QUIET)
    assert len(asked) == 2 * len(lines) - 10
    for label in ("first", "second"):
        _assert_equal(tmp_path / label, alone[label])


def test_an_interruption_between_the_models_answers_nothing_twice(
    plan: EvaluationPlan, models: dict[str, str], alone: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    asked = _asked(monkeypatch)
    counted = Predictor.answer

    def answer(self: Predictor, items: Any, features: Any) -> list[Answer]:
        if len(asked) == 40:  # the first model has answered the clean cell, the second two of three batches
            raise KeyboardInterrupt
        return counted(self, items, features)

    monkeypatch.setattr(Predictor, "answer", answer)
    chosen = [models["first"], models["second"]]
    with pytest.raises(KeyboardInterrupt):
        evaluate_models(plan, chosen, tmp_path, console=QUIET)
    monkeypatch.setattr(Predictor, "answer", counted)
    evaluate_models(plan, chosen, tmp_path, console=QUIET)
    assert len(asked) == 2 * 8 * N_PICTURES * N_CELLS
    for label in ("first", "second"):
        _assert_equal(tmp_path / label, alone[label])


@pytest.mark.usefixtures("one_model_opens_at_a_time")
def test_two_processes_share_the_pictures_and_write_what_one_writes(
    plan: EvaluationPlan, models: dict[str, str], alone: dict[str, Path], tmp_path: Path
) -> None:
    """Threads stand for processes: what they share is files and the barrier."""
    barrier = threading.Barrier(2, timeout=120)
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        processes = Processes(rank=rank, size=2, barrier=lambda: [barrier.wait()].clear())
        try:
            evaluate_models(plan, [models["first"], models["second"]], tmp_path, console=QUIET, processes=processes)
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for label in ("first", "second"):
        _assert_equal(tmp_path / label, alone[label])
        lines = (tmp_path / label / "predictions" / "scenes.none.0.jsonl").read_text().splitlines()
        assert {json.loads(line)["rank"] for line in lines} == {0, 1}
        assert list((tmp_path / label / "predictions" / "parts").iterdir()) == []


def _command(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str], list[str]]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["eval", *arguments])
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out.splitlines(), said.err.splitlines()


def test_the_command_with_several_models(
    plan: EvaluationPlan, models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unreadable picture fails in both; the batch check and the report are of both."""
    data, output = tmp_path / "scenes", tmp_path / "out"
    shutil.copytree(plan.data or "", data)
    sorted((data / "images" / "test").glob("*.png"))[0].write_bytes(b"GIF89a")
    arguments = ["--model", models["second"], "--model", models["first"], "--task", "scenes", "--data", str(data)]
    arguments += ["--max-new-tokens", "2", "--check-batch", "4", "--max-errors", "0.5", "--output", str(output)]
    code, out, lines = _command(*arguments, "--json", capsys=capsys)
    assert code == 3
    assert lines[-1] == "16 items failed (16 InputError); their records name the reason"
    summary = json.loads(out[-1])
    assert summary["results"] == str(output / "results.json")
    assert summary["evaluations"] == {name: str(output / name / "results.json") for name in ("second", "first")}
    assert {name: list(cells) for name, cells in summary["headline"].items()} == {
        "second": ["scenes/none/0"],
        "first": ["scenes/none/0"],
    }
    assert summary["n_errors"] == 16
    merged = json.loads((output / "results.json").read_text())
    assert {row["model"] for row in merged["results"]} == {models["first"], models["second"]}
    assert merged["robustness"]["comparisons"]
    assert (output / "report.html").is_file()
    for label in ("first", "second"):
        assert _manifest(output / label)["batch_invariant"] is True
        assert json.loads((output / label / "results.json").read_text())["batch_check"][0]["n_items"] == 4


@pytest.mark.slow
def test_two_processes_of_torchrun_write_what_one_process_writes(
    plan: EvaluationPlan, models: dict[str, str], alone: dict[str, Path], tmp_path: Path
) -> None:
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "eval.benchmark"]
    arguments += ["--model", models["first"], "--model", models["stock"], "--task", "scenes", "--data", str(plan.data)]
    arguments += ["--corruption", "gaussian_noise", "--severity", "5", "--max-new-tokens", "3", "--batch-size", "16"]
    names = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform == "linux":
        names["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, *arguments, "--output", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=os.environ | names, check=True, timeout=600)
    for label in ("first", "stock"):
        assert _predictions(tmp_path / label) == _predictions(alone[label])
    assert (tmp_path / "report.html").is_file()


def test_models_given_twice_and_folders_of_one_model_are_refused(
    plan: EvaluationPlan, models: dict[str, str], alone: dict[str, Path]
) -> None:
    chosen = [models["first"], models["second"]]
    before = sorted(alone["first"].rglob("*"))
    with pytest.raises(InputError, match="holds the evaluation of one model"):
        evaluate_models(plan, chosen, alone["first"], console=QUIET)
    with pytest.raises(InputError, match="the model is given twice") as error:
        evaluate_models(plan, [*chosen, models["first"] + "/"], alone["first"] / "new", console=QUIET)
    assert error.value.where == f"--model {models['first']}/"
    assert sorted(alone["first"].rglob("*")) == before


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        (["runs/a/model", "runs/b/model"], ["a", "b"]),
        (["runs/a/instruct/model", "runs/b/instruct/model", "c"], ["a-instruct", "b-instruct", "c"]),
        (["liuhaotian/llava-v1.5-7b", "llava-hf/llava-1.5-7b-hf"], ["llava-v1.5-7b", "llava-1.5-7b-hf"]),
        (["one/model", "two/one/model"], ["one", "two-one"]),
        (["model", "/model/x"], ["model", "x"]),
    ],
)
def test_labels_are_the_shortest_last_parts_that_differ(given: list[str], labels: list[str]) -> None:
    assert model_labels(given) == labels


def test_the_label_of_a_runs_model_is_the_runs_name(tmp_path: Path) -> None:
    for run in ("smoe", "symphony_smoe"):
        (tmp_path / run / "instruct" / "model").mkdir(parents=True)
        (tmp_path / run / "model").symlink_to(Path("instruct") / "model")
    assert model_labels([str(tmp_path / run / "model") for run in ("smoe", "symphony_smoe")]) == [
        "smoe",
        "symphony_smoe",
    ]
