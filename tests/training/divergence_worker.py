"""One of two processes whose losses are not finite in turn; says what it did with its gradients, as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from symphony_vlm.training.batch_sizes import BatchSizes
from symphony_vlm.training.divergence import Diverged, DivergenceWatch
from symphony_vlm.training.flops import TrainingFlops
from symphony_vlm.training.stage_warnings import StageWarnings
from symphony_vlm.training.throughput import Throughput


def main(folder: Path) -> None:
    """Step 1: both finite. 2: the first process is not. 3: both finite. 4, 5: the second process is not."""
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    warnings = StageWarnings(folder / "warnings.jsonl", lambda _: None, repeat_steps=1, silent=rank > 0)
    watch = DivergenceWatch(warnings, stop_after=2, last_saved=lambda: 0, stage="instruct")
    model, kept, stopped = nn.Linear(2, 2), [], 0
    for step in range(1, 6):
        model.weight.grad = torch.ones(2, 2)
        is_bad = (step == 2 and rank == 0) or (step >= 4 and rank == 1)
        watch.note(torch.tensor(float("nan") if is_bad else 1.0), None)
        try:
            watch.check(model, torch.tensor(1.0), step, is_taken=False)
        except Diverged:
            stopped = step
        kept.append(model.weight.grad is not None)
    counter = Throughput(TrainingFlops(token=1e9), 1.0, torch.device("cpu"))
    with counter.loading():
        pass
    counter.take([BatchSizes(samples=1 + rank, tokens=100 * (1 + rank), places=400)])
    counter.step_done()
    print(json.dumps({"kept": kept, "stopped": stopped, "figures": counter.read()}))  # noqa: T201
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
