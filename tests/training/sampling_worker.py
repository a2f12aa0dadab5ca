"""Processes that run a recipe together and note which records each step of each of them trains on.

Started by ``test_sampling.py`` as a script: a JSON file with the recipes to run one after the other (their number of
processes, output folder, and the step at which all processes are killed, or 0). The libraries are imported once, then
the processes fork.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

# First: torchvision without its compiled operators would break the import of transformers.
import symphony_vlm  # noqa: F401  # isort: skip
from rich.console import Console

from symphony_vlm.config.recipe import Recipe
from symphony_vlm.training.callbacks import JsonLog
from symphony_vlm.training.run import train
from symphony_vlm.training.trainer import StageTrainer

KILLED = 9


def note_records(path: Path) -> None:
    """Appends a line for each step: the token ids of its records, and the step before it."""
    original = StageTrainer.get_batch_samples

    def get_batch_samples(self: StageTrainer, *args: Any) -> Any:
        batches, num_items = original(self, *args)
        rows = [(batch, row) for batch in batches for row in range(len(batch["input_ids"]))]
        ids = [b["input_ids"][r][b["attention_mask"][r].bool()].tolist() for b, r in rows]
        with path.open("a") as file:
            file.write(json.dumps({"step": self.state.global_step, "ids": ids}) + "\n")
        return batches, num_items

    StageTrainer.get_batch_samples = get_batch_samples  # type: ignore[method-assign]


def kill_at(step: int) -> None:
    original = JsonLog.on_log

    def on_log(self: JsonLog, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        original(self, args, state, *rest, **kwargs)
        if state.global_step == step:
            os._exit(KILLED)

    JsonLog.on_log = on_log  # type: ignore[method-assign]


def run_rank(job: dict[str, Any], rank: int, port: int) -> None:
    if job["processes"] > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["processes"], "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"})
    note_records(Path(job["output"]).with_suffix(f".rank{rank}.jsonl"))
    if job["kill_at"]:
        kill_at(job["kill_at"])
    train(Recipe.model_validate(job["recipe"]), Path(job["output"]), console=Console(quiet=True))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def main(jobs: str) -> int:
    """0 if every process ended as it should."""
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    for job in json.loads(Path(jobs).read_text()):
        port = free_port()
        processes = [context.Process(target=run_rank, args=(job, rank, port)) for rank in range(job["processes"])]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        codes = [process.exitcode for process in processes]
        if any(code != (KILLED if job["kill_at"] else 0) for code in codes):
            sys.stderr.write(f"{job['output']}: exit codes {codes}\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
