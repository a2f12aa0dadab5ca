"""Under every engine two processes train as one does, save what one saves, and go on after a kill.

Batches with and without images are mixed, and a batch without images leaves experts unused (``engine_worker.py``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from symphony_vlm.config.recipe import Recipe

WORKER = Path(__file__).with_name("engine_worker.py")
STEPS, KILL = 8, 6
ENGINES = ["fsdp2", "zero2", "zero3"]
OTHERS = ["ddp", "zero1", "zero2_offload", "zero3_offload"]
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install symphony-vlm[test]"
)
Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def data(tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations about pictures, and as many without one."""
    scenes = tiny_run.folder / "scenes"
    pictures = json.loads((scenes / "train.json").read_text())[:24]
    for record in pictures:
        record["image"] = str(scenes / record["image"])
    words = [
        {
            "id": f"words{i}",
            "conversations": [{"from": "human", "value": f"What is {i}?"}, {"from": "gpt", "value": f"It is {i}."}],
        }
        for i in range(24)
    ]
    path = tmp_path_factory.mktemp("data") / "mixed.json"
    path.write_text(json.dumps([record for pair in zip(pictures, words, strict=True) for record in pair]))
    return path


@pytest.fixture(scope="module")
def make_job(tiny_run: Any, only_stage: Callable[..., Recipe], data: Path) -> Make:
    """A job for the worker: a projector stage under one engine, then instruction under another."""

    def make(
        output: Path,
        before: str,
        engine: str,
        *,
        processes: int = 2,
        kill_at: int = 0,
        moe: dict[str, Any] | None = None,
        **stage: Any,
    ) -> dict[str, Any]:
        settings = {"batch_size": 2, "global_batch_size": 4, "log_steps": 1, "save_fraction": 0.5}
        sources = {"captions": None, "train": str(data), "validation_fraction": 0.0}
        recipe = only_stage("instruct", start="pretrain", data=sources, max_steps=STEPS, engine=engine, **settings)
        values = recipe.model_dump(mode="json")
        # Quick graphs: what they do must show in eight steps.
        values["model"]["moe"] = {**values["model"]["moe"], "momentum": 0.5, "strength": 0.9, **(moe or {})}
        values["stages"][0] |= stage
        first = {"name": "align", "kind": "multimodal", "train": {"projector": 1e-3}, "max_steps": 2}
        values["stages"].insert(0, {**first, **settings, "engine": before, "bf16": values["stages"][0]["bf16"]})
        return {"recipe": values, "processes": processes, "output": str(output), "kill_at": kill_at}

    return make


def run_all(folder: Path, jobs: list[dict[str, Any]]) -> None:
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, str(WORKER), str(file)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, make_job: Make) -> Path:
    """One process alone, and two under each engine: the stage before under another, killed and continued."""
    folder = tmp_path_factory.mktemp("engines")
    jobs = [make_job(folder / "alone", "auto", "auto", processes=1)]
    for before, engine in zip(ENGINES[1:] + ENGINES[:1], ENGINES, strict=True):
        jobs += [make_job(folder / engine, before, engine, kill_at=step) for step in (KILL, 0)]
    run_all(folder, jobs)
    return folder


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights(run: Path, stage: str = "instruct") -> dict[str, torch.Tensor]:
    return load_file(run / stage / "model" / "model.safetensors")


def notes(run: Path, rank: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.with_suffix(f".rank{rank}.jsonl").read_text().splitlines()]


def compare(run: Path, alone: Path) -> None:
    """Two processes with one.

    All is fp32 and differs by the order of sums alone: gradients of two processes are halved and added, a norm is
    added up from parts. That is a relative 1e-7 a step. Adam divides a gradient by its own size, so where the true
    gradient is zero (biases of attention keys, which softmax takes out) rounding alone decides on a step of up to
    the rate, 1e-3, over the ratio of rounding to epsilon: 3e-6 measured. Such weights move no loss.
    """
    found, expected = log(run), log(alone)
    assert [(entry["stage"], entry["step"]) for entry in found] == [(e["stage"], e["step"]) for e in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for key in ("loss", "grad_norm", "balance", "z", "router"):
            if key in a:
                assert a[key] == pytest.approx(b[key], abs=5e-6), (a["stage"], a["step"], key)
    for stage in ("align", "instruct"):
        saved, whole = weights(run, stage), weights(alone, stage)
        assert saved.keys() == whole.keys()
        for name, tensor in whole.items():
            assert saved[name].dtype == tensor.dtype
            torch.testing.assert_close(saved[name], tensor, atol=3e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        files = [sorted(path.name for path in (r / stage / "model").iterdir()) for r in (run, alone)]
        assert files[0] == files[1]
        configs = [(r / stage / "model" / "config.json").read_text() for r in (run, alone)]
        assert configs[0] == configs[1]
    # Counted graphs are whole numbers divided once: equal to the last bit, and moved.
    graphs = [name for name in whole if name.endswith("expert_graph.adjacency_EE")]
    assert len(graphs) == 2
    for name in graphs:
        assert torch.equal(saved[name], whole[name])
        assert (whole[name] - torch.eye(4)).abs().max() > 0.1
    for a, b in zip(*(routing(r) for r in (run, alone)), strict=True):
        assert a == b


def routing(run: Path) -> list[Any]:
    """The routing log without what is a sum of floats."""
    entries = [json.loads(line) for line in (run / "instruct" / "routing.jsonl").read_text().splitlines()]
    return [
        (
            entry["step"],
            {layer: (values["load"], values["tokens"]) for layer, values in entry["layers"].items()},
            {name: (graph["adjacency"], graph["num_updates"]) for name, graph in entry["graphs"].items()},
        )
        for entry in entries
    ]


@needs_deepspeed
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_and_save_as_one_does_and_go_on_after_a_kill(runs: Path, engine: str) -> None:
    compare(runs / engine, runs / "alone")
    checkpoint = runs / engine / "instruct" / f"checkpoint-{STEPS}"
    own = "pytorch_model_fsdp.bin" if engine == "fsdp2" else f"global_step{STEPS}"
    assert (checkpoint / own).exists(), "it trained under another engine"
    # The processes differed: one had images where the other had none, and used experts that the other did not.
    pairs = list(zip(notes(runs / engine, 0), notes(runs / engine, 1), strict=True))
    assert any(a["images"] != b["images"] for a, b in pairs)
    apart = [(a["experts"], b["experts"]) for a, b in pairs if a["experts"] and a["images"] != b["images"]]
    assert any([[0, 1], [0, 1]] in both and both != ([[0, 1], [0, 1]],) * 2 for both in apart)


@needs_deepspeed
def test_saved_models_open_where_deepspeed_is_absent(runs: Path, tmp_path: Path) -> None:
    script = tmp_path / "absent.py"
    script.write_text(
        "import importlib.machinery, sys\n"
        "find = importlib.machinery.PathFinder.find_spec\n"
        "hide = lambda name, *rest: None if name.split('.')[0] == 'deepspeed' else find(name, *rest)\n"
        "importlib.machinery.PathFinder.find_spec = staticmethod(hide)\n"
        "import symphony_vlm as sv, torch\n"
        "logits = []\n"
        "for folder in sys.argv[1:]:\n"
        "    model = sv.load(folder, device='cpu')\n"
        "    with torch.no_grad():\n"
        "        logits.append(model(**model.probe_inputs()).logits)\n"
        "assert 'deepspeed' not in sys.modules\n"
        "for other in logits[1:]:\n"
        # Weights differ by 3e-5 at most, on logits of about 1.
        "    torch.testing.assert_close(other, logits[0], atol=1e-4, rtol=0)\n"
        "try:\n"
        "    import deepspeed\n"
        "except ModuleNotFoundError:\n"
        "    print('absent')\n"
    )
    folders = [str(runs / name / "instruct" / "model") for name in ("alone", *ENGINES)]
    done = subprocess.run([sys.executable, str(script), *folders], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "absent"
