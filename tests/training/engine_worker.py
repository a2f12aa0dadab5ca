"""Processes that run recipes together under their engines, and note what each step of each of them saw.

Started by ``test_engines.py`` as a script: a JSON file with the jobs to do one after the other (recipe, number of
processes, output folder, the log step of the last stage at which all processes are killed, or 0). The libraries are
imported once, then the processes fork.

A batch without an image is routed to the first experts alone, as many as a token has: one process then leaves experts
unused that another needs.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

# First: torchvision without its compiled operators would break the import of transformers.
import symphony_vlm  # noqa: F401  # isort: skip
import torch
from rich.console import Console
from sampling_worker import KILLED, free_port

from symphony_vlm.config.recipe import Recipe
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
from symphony_vlm.moe.recording import RoutingRecorder
from symphony_vlm.moe.router import Router
from symphony_vlm.training.callbacks import JsonLog
from symphony_vlm.training.run import train

PULL = 20.0
"""Added to the logits of the first experts; far more than the tiny model's gates give."""


def route_text_to_the_first_experts(notes: Path) -> None:
    """And note, for each training pass, whether it had images and which experts it used."""
    has_images = True
    forward, logits, close = (
        SymphonyVLMForConditionalGeneration.forward,
        Router.logits,
        RoutingRecorder._close,
    )

    def noting_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal has_images
        has_images = kwargs.get("pixel_values") is not None
        return forward(self, *args, **kwargs)

    def pulled_logits(self: Router, x_TD: torch.Tensor) -> torch.Tensor:
        logits_TE = logits(self, x_TD)
        if not has_images:
            pull_E = torch.zeros(logits_TE.shape[-1])
            pull_E[: self.config.num_experts_per_tok] = PULL
            logits_TE = logits_TE + pull_E
        return logits_TE

    def noting_close(self: RoutingRecorder, module: Any, *args: Any) -> None:
        if module.training and self.outputs:
            used = [sorted(set(out.indices_TK.flatten().tolist())) for out in self.outputs.values()]
            with notes.open("a") as file:
                file.write(json.dumps({"images": has_images, "experts": used}) + "\n")
        close(self, module, *args)

    SymphonyVLMForConditionalGeneration.forward = noting_forward  # type: ignore[method-assign]
    Router.logits = pulled_logits  # type: ignore[method-assign]
    RoutingRecorder._close = noting_close  # type: ignore[method-assign]


def kill_at(stage: str, step: int) -> None:
    original = JsonLog.on_log

    def on_log(self: JsonLog, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        original(self, args, state, *rest, **kwargs)
        if self._stage == stage and state.global_step == step:
            os._exit(KILLED)

    JsonLog.on_log = on_log  # type: ignore[method-assign]


def run_rank(job: dict[str, Any], rank: int, port: int) -> None:
    torch.set_num_threads(1)
    if job["processes"] > 1:
        number = job["processes"]
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
        places |= {"MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in places.items()})
    route_text_to_the_first_experts(Path(job["output"]).with_suffix(f".rank{rank}.jsonl"))
    recipe = Recipe.model_validate(job["recipe"])
    if job["kill_at"]:
        kill_at(recipe.stages[-1].name, job["kill_at"])
    train(recipe, Path(job["output"]), console=Console(quiet=True))


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
