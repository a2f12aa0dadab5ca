"""SIGKILL at any moment, also while a checkpoint is written: the run that goes on ends with the same bits."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils._pytree import tree_leaves

from symphony_vlm.config.loading import load_recipe
from symphony_vlm.config.recipe import Recipe

WORKER = Path(__file__).with_name("kill_worker.py")
MEASURED = ("runtime", "per_second")
"""Parts of the names of log fields that are measured times, which no two runs share."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process groups are killed by signal")


def run_all(folder: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, str(WORKER), str(file)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    said = "\n".join(line for line in done.stderr.splitlines() if line and "it/s]" not in line)
    assert done.returncode == 0, said[-3000:]
    reports: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return reports


def log(run: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if not any(part in k for part in MEASURED)} for entry in entries]


def state(run: Path) -> dict[str, Any]:
    stages = json.loads((run / "state.json").read_text())["stages"]
    return {name: {k: v for k, v in facts.items() if k != "seconds"} for name, facts in stages.items()}


def assert_equal_runs(run: Path, reference: Path) -> None:
    """Every file of models and logs byte for byte, and all that a restart would need, value by value."""
    assert log(run) == log(reference)
    assert state(run) == state(reference)
    names = [path.relative_to(reference) for path in reference.rglob("*") if path.is_file()]
    equal = [
        n for n in names if n.suffix == ".safetensors" or n.name in ("routing.jsonl", "routing.json", "records.json")
    ]
    assert {name.name for name in equal} >= {"model.safetensors", "routing.jsonl", "routing.json", "records.json"}
    assert [name for name in equal if (run / name).read_bytes() != (reference / name).read_bytes()] == []
    saved = [name for name in names if name.suffix in (".pt", ".pth")]
    assert {name.name.split("_")[0] for name in saved} >= {"optimizer.pt", "scheduler.pt", "rng"}
    for name in saved:
        assert_equal_values(run / name, reference / name)
    assert not list(run.glob("*/.saving"))
    assert not list(run.glob("*/.model.*"))


def assert_equal_values(file: Path, reference: Path) -> None:
    from transformers.trainer_pt_utils import safe_globals

    with safe_globals():
        found, expected = (tree_leaves(torch.load(path, weights_only=True)) for path in (file, reference))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        # Arrays of numpy's random state too.
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)) if hasattr(a, "shape") else a == b, file


@pytest.fixture(scope="module")
def planned(only_stage: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Short runs by folder and where their kills fell; one start of the worker, as its imports take the most time."""
    folder = tmp_path_factory.mktemp("planned")
    settings = {"max_steps": 8, "batch_size": 4, "log_steps": 2, "save_fraction": 0.25}
    recipe = only_stage("instruct", **settings).model_dump(mode="json")
    one = {"recipe": recipe, "processes": 1}
    kills = [
        {"inside": "optimizer", "step": 2},
        {"inside": "manifest", "step": 4},
        {"inside": "renamed", "step": 6},
    ]
    jobs = [{**one, "output": str(folder / "whole1"), "kills": []}]
    jobs += [{**one, "output": str(folder / "killed1"), "kills": kills}]
    # The second process also fails to write its part of one checkpoint.
    two = {"recipe": recipe, "processes": 2}
    kills = [{"inside": "optimizer", "step": 2}, {"inside": "random_state", "step": 8, "rank": 1}]
    jobs += [{**two, "output": str(folder / "whole2"), "kills": []}]
    jobs += [{**two, "output": str(folder / "killed2"), "kills": kills, "fails": 4}]
    reports = run_all(folder, jobs)
    return {job["output"]: report["fell"] for job, report in zip(jobs, reports, strict=True)}


def folder_of(planned: dict[str, list[str]], name: str) -> Path:
    return next(Path(folder) for folder in planned if Path(folder).name == name)


@pytest.mark.parametrize(("processes", "starts"), [(1, ["2", "6"]), (2, ["6"])])
def test_kills_inside_checkpoint_writing_leave_no_trace(
    planned: dict[str, list[str]], processes: int, starts: list[str]
) -> None:
    killed = folder_of(planned, f"killed{processes}")
    saving = "instruct: saving a checkpoint"
    if processes == 1:
        # In the third, the checkpoint was in its place already.
        assert planned[str(killed)] == [saving, saving, "instruct"]
    else:
        # In the second, the first process may not have begun to save when the second one dies in it.
        assert planned[str(killed)] in ([saving, saving], [saving, "instruct"])
    said = killed.with_suffix(".said").read_text()
    assert re.findall(r"continuing after step (\d+)", said) == starts
    assert_equal_runs(killed, folder_of(planned, f"whole{processes}"))


def test_a_process_that_cannot_write_its_part_does_not_keep_the_others_waiting(planned: dict[str, list[str]]) -> None:
    text = folder_of(planned, "killed2").with_suffix(".said").read_text()
    said = [line for line in text.splitlines() if "could not be saved" in line]
    assert len(said) == 1
    assert "checkpoint-4 could not be saved (process 1: No space left on device): it takes about " in said[0]
    assert "checkpoint-2 stays. Training goes on" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills_at_random_moments_leave_no_trace(tmp_path: Path, processes: int) -> None:
    """In all stages but perhaps one, half of them while a checkpoint is written."""
    recipe = load_recipe("tiny").model_dump(mode="json")
    for stage, steps in zip(recipe["stages"], (12, 12, 16, 30), strict=True):
        # A checkpoint at every log step.
        stage.update(max_steps=steps, save_fraction=0.01)
        stage["batch_size"] //= processes
    job = {"recipe": recipe, "processes": processes}
    jobs = [{**job, "output": str(tmp_path / "whole"), "kills": []}]
    jobs += [{**job, "output": str(tmp_path / "killed"), "draw": {"number": 20, "seed": processes}}]
    fell = run_all(tmp_path, jobs)[1]["fell"]
    counts = {where: fell.count(where) for where in dict.fromkeys(fell)}
    sys.stdout.write(f"{processes} processes: {counts}\n")
    assert len(fell) == 20
    assert sum("saving a checkpoint" in where for where in fell) >= 5
    # Moments are drawn by progress and by the clock: a stage that is over in a second may be missed.
    assert len({where.partition(":")[0] for where in fell}) >= len(recipe["stages"]) - 1
    assert_equal_runs(tmp_path / "killed", tmp_path / "whole")


def descendants(pid: int) -> list[int]:
    """Of a process, itself first. torchrun gives its workers sessions of their own."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(below for child in children for below in descendants(int(child)))]


def last_step(run: Path) -> int:
    path = run / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return whole[-1]["step"] if whole else 0


@pytest.mark.slow
def test_torchrun_is_killed_stopped_and_started_again(only_stage: Callable[..., Recipe], tmp_path: Path) -> None:
    """SIGKILL to all of its processes, SIGTERM to itself alone, which it passes on."""
    settings = {"max_steps": 40, "batch_size": 4, "log_steps": 2, "save_fraction": 0.05}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(only_stage("instruct", **settings).model_dump(mode="json")))
    root = Path(__file__).resolve().parents[2]

    def start(run: Path) -> subprocess.Popen[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*launcher, "-m", "train.instruct", "--config", str(recipe), "--output", str(run)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        output = (tmp_path / f"{run.name}.said").open("a")
        return subprocess.Popen(command, cwd=root, env=environment, stdout=output, stderr=output, text=True)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for step, number in ((5, signal.SIGKILL), (13, signal.SIGTERM), (21, signal.SIGKILL), (31, signal.SIGKILL)):
        process = start(killed)
        give_up = time.monotonic() + 240
        while last_step(killed) < step:
            assert process.poll() is None, (tmp_path / "killed.said").read_text()[-3000:]
            assert time.monotonic() < give_up
            time.sleep(0.005)
        for pid in descendants(process.pid) if number == signal.SIGKILL else [process.pid]:
            os.kill(pid, number)
        assert process.wait(timeout=120) != 0
    said = (tmp_path / "killed.said").read_text()
    stopped = re.findall(r"stopped by SIGTERM after step (\d+) of instruct; .* from step (\d+)", said)
    assert len(stopped) >= 1
    assert len({step for pair in stopped for step in pair}) == 1, "every process stopped after the same step"
    for run in (killed, whole):
        assert start(run).wait(timeout=240) == 0
    found, expected = ((run / "instruct/model/model.safetensors").read_bytes() for run in (killed, whole))
    assert found == expected
