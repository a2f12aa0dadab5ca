"""Launched processes are one run, or the launch is refused; the scripts in ``train/launch`` start such runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from symphony_vlm.config.recipe import Recipe
from symphony_vlm.errors import InputError
from symphony_vlm.training.launch import check_launch, join_processes
from symphony_vlm.training.run import train

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "train" / "launch"
STEPS = 4
TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher's variable is set, wherever the tests themselves run."""
    for name in list(os.environ):
        if name in TORCHRUN or name.startswith(("SLURM_", "OMPI_", "PMI_", "MV2_")):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("name", TORCHRUN)
def test_half_a_launchers_variables_are_refused_before_anybody_waits(name: str) -> None:
    check_launch({})
    check_launch({"WORLD_SIZE": "1", "RANK": "0"})  # some clusters set these everywhere
    check_launch(TORCHRUN)
    with pytest.raises(InputError, match=rf"but not {name}\. Start it with torchrun"):
        # Without LOCAL_RANK, WORLD_SIZE alone tells; without WORLD_SIZE, LOCAL_RANK does.
        check_launch({key: value for key, value in TORCHRUN.items() if key != name})
    with pytest.raises(InputError, match="WORLD_SIZE: 'two' is no number of processes"):
        check_launch({"WORLD_SIZE": "two"})


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_a_process_beside_others_that_it_does_not_see_is_refused_and_writes_nothing(
    alone: pytest.MonkeyPatch, only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console, name: str
) -> None:
    alone.setenv(name, "3")
    with pytest.raises(InputError, match=rf"{name} is 3, but this process sees 1: started 3 times, each would work"):
        train(only_stage("instruct"), tmp_path / "run", console=quiet)
    assert not (tmp_path / "run").exists()


def test_the_variables_that_are_nearer_to_the_process_count(alone: pytest.MonkeyPatch) -> None:
    """A batch job of several tasks whose step, or whose torchrun, has one process."""
    alone.setenv("SLURM_NTASKS", "4")
    alone.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert join_processes(cpu=True).num_processes == 1


def test_the_rank_on_the_command_line_must_be_the_launchers(alone: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--local_rank=1 was given, but the variable LOCAL_RANK is not set"):
        join_processes(cpu=True, local_rank=1)


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    names = {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **environment}
    if sys.platform == "linux":
        names["GLOO_SOCKET_IFNAME"] = "lo"
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | names, **pipes)


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    process = start(command, **environment)
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def test_the_command_refuses_a_launch_in_one_line(alone: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train.instruct", "--config", "tiny", "--output", str(tmp_path / "run")]
    done = run(command, WORLD_SIZE="2", RANK="1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: launch: a launcher has set RANK=1, WORLD_SIZE=2, but not LOCAL_RANK,")
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def recipe_file(only_stage: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny``'s last stage, from the model before it; steps of eight samples, however many processes."""
    settings = {"batch_size": 4, "global_batch_size": 8, "max_steps": STEPS, "log_steps": 1, "save_fraction": 1.0}
    path = tmp_path_factory.mktemp("recipe") / "instruct.yaml"
    recipe = only_stage("instruct", data={"captions": None, "validation_fraction": 0.0}, **settings)
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return path


@pytest.fixture(scope="module")
def one_process(recipe_file: Path) -> list[float]:
    """The losses that every launch must come to."""
    recipe = Recipe.model_validate(yaml.safe_load(recipe_file.read_text()))
    train(recipe, recipe_file.parent / "one", console=Console(quiet=True))
    return losses(recipe_file.parent / "one")


def losses(output: Path) -> list[float]:
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def check(done: subprocess.CompletedProcess[str], output: Path, expected: list[float]) -> None:
    """It was one run of two processes, with the losses of one process."""
    assert done.returncode == 0, done.stderr[-3000:]
    # fp32 sums in another order; a relative 1e-7 a step of losses near 6.
    assert losses(output) == pytest.approx(expected, abs=5e-6)
    assert json.loads((output / "state.json").read_text())["stages"]["instruct"]["processes"] == 2
    assert (output / "instruct" / f"checkpoint-{STEPS}" / "rng_state_1.pth").is_file()
    summaries = [line for line in done.stdout.splitlines() if line.startswith("{")]  # DeepSpeed's launcher talks too
    assert [json.loads(line)["step"] for line in summaries] == [STEPS]


def test_two_processes_of_torchrun_are_one_run_with_the_losses_of_one_process(
    alone: pytest.MonkeyPatch, recipe_file: Path, one_process: list[float], tmp_path: Path
) -> None:
    arguments = ["--config", str(recipe_file), "--output", str(tmp_path / "run"), "--json"]
    check(run([str(SCRIPTS / "torchrun.sh"), *arguments], NPROC="2"), tmp_path / "run", one_process)


@pytest.mark.parametrize("path", sorted(SCRIPTS.iterdir()), ids=lambda path: path.name)
def test_launch_scripts_are_executable_and_parse(path: Path) -> None:
    assert os.access(path, os.X_OK)
    assert "\nset -euo pipefail\n" in path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.slow
def test_two_machines_are_one_run(
    alone: pytest.MonkeyPatch, recipe_file: Path, one_process: list[float], tmp_path: Path
) -> None:
    """Both are this one."""
    command = [str(SCRIPTS / "torchrun_multinode.sh"), "--config", str(recipe_file), "--output", str(tmp_path / "run")]
    place = {"NNODES": "2", "NPROC": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    first, second = (start([*command, "--json"], NODE_RANK=rank, **place) for rank in "01")
    out, err = first.communicate(timeout=240)
    assert second.wait(timeout=60) == 0
    check(subprocess.CompletedProcess(command, first.returncode, out, err), tmp_path / "run", one_process)


@pytest.mark.slow
def test_the_slurm_script_starts_one_torchrun_per_node(
    alone: pytest.MonkeyPatch, recipe_file: Path, one_process: list[float], tmp_path: Path
) -> None:
    """With stand-ins for Slurm's own commands, one node."""
    tools = {"scontrol": 'echo "127.0.0.1"', "srun": 'shift; export SLURM_NODEID=0 SLURM_STEP_NUM_TASKS=1; exec "$@"'}
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "a"}
    job |= {"SLURM_NTASKS": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}", "MASTER_PORT": free_port()}
    arguments = ["--config", str(recipe_file), "--output", str(tmp_path / "run"), "--json"]
    check(run([str(SCRIPTS / "slurm.sbatch"), *arguments], NPROC="2", **job), tmp_path / "run", one_process)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install symphony-vlm[test]")
@pytest.mark.parametrize("launcher", ["script", "with --local_rank"])
def test_deepspeeds_launcher_starts_one_run(
    alone: pytest.MonkeyPatch, recipe_file: Path, one_process: list[float], tmp_path: Path, launcher: str
) -> None:
    arguments = ["--config", str(recipe_file), "--output", str(tmp_path / "run"), "--json"]
    arguments += ["stages.instruct.engine=zero1"]
    port = free_port()
    command = [str(SCRIPTS / "deepspeed.sh")]
    if launcher != "script":
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port]
        command += ["--module", "train.instruct"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # of ninja
    done = run([*command, *arguments], NPROC="2", MASTER_PORT=port, DS_ACCELERATOR="cpu", PATH=path)
    check(done, tmp_path / "run", one_process)
