"""Runs recipes in processes of their own and kills them all at once, at planned or at drawn moments, until they finish.

Started by ``test_kills.py`` as a script with a JSON file: a list of jobs (recipe, output folder, number of processes,
kills). The libraries are imported once, then every start forks. Prints where each kill fell, as JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

# First: torchvision without its compiled operators would break the import of transformers.
import symphony_vlm  # noqa: F401  # isort: skip
from rich.console import Console
from sampling_worker import free_port  # type: ignore[import-not-found]

from symphony_vlm.config.recipe import Recipe
from symphony_vlm.training import checkpoints as checkpoints_module
from symphony_vlm.training.checkpoints import Checkpoints
from symphony_vlm.training.run import train
from symphony_vlm.training.trainer import StageTrainer

CONTEXT = multiprocessing.get_context("fork")


def kill_group() -> None:
    os.killpg(0, signal.SIGKILL)


def half_of_the_optimizer(self: StageTrainer, folder: str) -> None:
    (Path(folder) / "optimizer.pt").write_bytes(b"half")
    kill_group()


def kill_inside(where: str, step: int) -> None:
    """Makes this process kill its whole group while it saves the checkpoint of a step."""
    original = Checkpoints.save

    def save(self: Checkpoints, at: int, *args: Any, **kwargs: Any) -> bool:
        if at == step:
            if where == "optimizer":
                StageTrainer._save_optimizer_and_scheduler = half_of_the_optimizer  # type: ignore[method-assign]
            elif where == "random_state":
                StageTrainer._save_rng_state = lambda *_: kill_group()  # type: ignore[method-assign]
            elif where == "manifest":
                checkpoints_module.write_manifest = lambda *_, **__: kill_group()  # type: ignore[assignment]
            elif where == "renamed":
                Checkpoints._remove_old = lambda *_: kill_group()  # type: ignore[method-assign]
        return original(self, at, *args, **kwargs)

    Checkpoints.save = save  # type: ignore[method-assign]


def fail_at(step: int) -> None:
    """Makes this process alone fail to write the checkpoint of a step."""
    original = StageTrainer._save_rng_state

    def save_rng_state(self: StageTrainer, folder: str) -> None:
        if self.state.global_step == step:
            raise OSError(28, "No space left on device")
        original(self, folder)

    StageTrainer._save_rng_state = save_rng_state  # type: ignore[method-assign]


def run_rank(job: dict[str, Any], kill: dict[str, Any], rank: int, port: int) -> None:
    if job["processes"] > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["processes"], "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"})
    if "inside" in kill and rank == kill.get("rank", 0):
        kill_inside(kill["inside"], kill["step"])
    if "fails" in job and rank == job["processes"] - 1:
        fail_at(job["fails"])
    said = Path(job["output"]).with_suffix(".said").open("a")
    train(Recipe.model_validate(job["recipe"]), Path(job["output"]), console=Console(file=said, width=1000))


def run_group(job: dict[str, Any], kill: dict[str, Any]) -> None:
    os.setsid()
    port = free_port()
    ranks = [CONTEXT.Process(target=run_rank, args=(job, kill, rank, port)) for rank in range(job["processes"])]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))


def progress(run: Path, stages: list[str]) -> tuple[int, int]:
    """Number of the stage and step of the last whole line of the log."""
    path = run / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    if not whole:
        return (-1, 0)
    entry = json.loads(whole[-1])
    return (stages.index(entry["stage"]), entry["step"])


def number_of(file: Path) -> int:
    """Of the file's contents on disk; 0 if there are none."""
    return file.stat().st_ino if file.is_file() else 0


def files_being_saved(run: Path) -> int:
    """-1 when no checkpoint is being saved."""
    try:
        folders = list(run.glob("*/.saving/checkpoint-*"))
        return sum(1 for folder in folders for _ in folder.rglob("*")) if folders else -1
    except FileNotFoundError:  # renamed while it was looked at
        return -1


def wait_for_the_moment(run: Path, stages: list[str], kill: dict[str, Any], group: Any, old_log: int) -> bool:
    """False if the run ended before.

    A start that trains replaces the log, if only by a copy of itself: before that, its last line says nothing about it.
    """
    if kill["after"] is not None:
        point = (stages.index(kill["after"][0]), kill["after"][1])
        while number_of(run / "log.jsonl") == old_log or progress(run, stages) < point:
            if not group.is_alive():
                return False
            time.sleep(0.002)
    if "files" in kill:  # while saving, when so many files are there
        while files_being_saved(run) < kill["files"]:
            if not group.is_alive():
                return False
            time.sleep(0.0005)
    time.sleep(kill["wait"])
    return group.is_alive()  # type: ignore[no-any-return]


def where_it_fell(run: Path) -> str:
    file = run / "state.json"
    state = json.loads(file.read_text())["stages"] if file.is_file() else {}
    running = [name for name, values in state.items() if values.get("status") == "running"]
    stage = running[0] if running else "between stages"
    if files_being_saved(run) >= 0:
        return f"{stage}: saving a checkpoint"
    if list(run.glob("*/.model.tmp")) or list(run.glob("*/.model.old")):
        return f"{stage}: saving the model"
    return stage


def start(job: dict[str, Any], kill: dict[str, Any]) -> Any:
    group = CONTEXT.Process(target=run_group, args=(job, kill))
    group.start()
    return group


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Kills as planned, then lets the run finish."""
    folder = Path(job["output"])
    stages = [stage["name"] for stage in job["recipe"]["stages"]]
    fell = []
    for kill in job["kills"]:
        old_log = number_of(folder / "log.jsonl")
        group = start(job, kill)
        if "after" in kill:
            if not wait_for_the_moment(folder, stages, kill, group, old_log):
                raise SystemExit(f"{folder}: ended with {group.exitcode} before {kill}")
            os.killpg(group.pid, signal.SIGKILL)
        group.join(120)
        if group.exitcode != -signal.SIGKILL:
            raise SystemExit(f"{folder}: ended with {group.exitcode} and not by {kill}")
        fell.append(where_it_fell(folder))
    group = start(job, {})
    group.join()
    if group.exitcode != 0:
        raise SystemExit(f"{folder}: ended with {group.exitcode}")
    return {"fell": fell}


def drawn_kills(recipe: dict[str, Any], number: int, seed: int) -> list[dict[str, Any]]:
    """Moments in their order, equally many in each stage.

    Every other one while a checkpoint is saved, some soon after a start, the others while it trains.
    """
    drawn = random.Random(seed)
    kills: list[dict[str, Any]] = []
    for stage in recipe["stages"]:
        # At its end nothing may be left to kill.
        for step in sorted(drawn.sample(range(stage["max_steps"] - 2), number // len(recipe["stages"]))):
            if len(kills) % 2:
                # Seven files are in the checkpoints of all stages.
                kills.append({"after": (stage["name"], step), "wait": 0.0, "files": drawn.randrange(7)})
            elif len(kills) % 8 == 4:
                kills.append({"after": None, "wait": drawn.uniform(0.0, 2.0)})
            else:
                kills.append({"after": (stage["name"], step), "wait": drawn.uniform(0.0, 0.1)})
    return kills


def main(jobs: str) -> None:
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    reports = []
    for job in json.loads(Path(jobs).read_text()):
        if "draw" in job:
            job["kills"] = drawn_kills(job["recipe"], **job["draw"])
        reports.append(run(job))
    sys.stdout.write(json.dumps(reports) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
