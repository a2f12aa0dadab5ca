"""Two data-parallel processes, some of whose batches have no image, and a single one with all of them.

Started by ``test_distributed_batches.py``; the argument is a folder for the gradients of every step.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import make_tiny_model

from symphony_vlm.model.attention import attention_by_document
from symphony_vlm.moe.configuration import MoEConfig

# For each step, the images of each process's batch of two rows; the last step is packed.
STEPS = [(2, 0), (0, 2), (0, 0), (1, 0), (1, 0)]
WORLD_SIZE = 2


def batch(model: Any, step: int, rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    num_images, num_tokens = STEPS[step][rank], model.processor.num_image_tokens
    ids = torch.randint(10, 60, (2, num_tokens + 6), generator=generator)
    ids[:num_images, :num_tokens] = model.config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[:, -4:] = ids[:, -4:]
    inputs = {"input_ids": ids, "labels": labels}
    if num_images:
        size = model.vision_tower.config.image_size
        inputs["pixel_values"] = torch.rand(num_images, 3, size, size, generator=generator)
    if step == len(STEPS) - 1:
        inputs["document_ids"] = torch.zeros_like(ids)
        inputs["document_ids"][:, num_tokens:] = 1
        inputs["document_ids"][0, -1] = -1
    return inputs


def train(rank: int, world_size: int) -> list[dict[str, Tensor]]:
    """Gradients of every step by name, means over the processes' batches."""
    model: Any = make_tiny_model(moe=MoEConfig(num_experts=4, router="smoe")).train()
    model.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parallel: Any = DistributedDataParallel(model) if world_size > 1 else model
    gradients = []
    for step in range(len(STEPS)):
        packed = step == len(STEPS) - 1
        with attention_by_document(model.language_model) if packed else nullcontext():
            for share in range(rank, WORLD_SIZE, world_size):
                (parallel(**batch(model, step, share)).loss * world_size / WORLD_SIZE).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    return gradients


def run_rank(folder: str, rank: int, world_size: int) -> None:
    if world_size > 1:
        # A process that waits for one that has died must not outlive the test.
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
    torch.save(train(rank, world_size), Path(folder) / f"{world_size}-{rank}.pt")
    if world_size > 1:
        dist.destroy_process_group()


def main(folder: str) -> int:
    """0 if every process ended well."""
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    processes = [context.Process(target=run_rank, args=(folder, *job)) for job in ((0, 2), (1, 2), (0, 1))]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max(abs(process.exitcode or 0) for process in processes)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
