"""Data-parallel processes that train on their rows and save the expert graphs after every step.

Started by ``test_expert_graph_distributed.py``; the arguments are a folder for the results and the number of processes
of each run. The libraries are imported once, then the processes fork.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import expert_graphs, update_expert_graphs
from symphony_vlm.moe.layer import SparseMoE
from symphony_vlm.moe.recording import RoutingRecorder

HIDDEN = 8
STEPS, MICRO_BATCHES, ROWS = 3, 2, 4
CONFIG = MoEConfig(num_experts=4, router="symphony_smoe", momentum=0.5, strength=0.9)


class ThreeLayers(nn.Module):
    """Residual sparse layers, the last of which is frozen."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": HIDDEN, "intermediate_size": 12, "hidden_act": "silu"}
        self.layers = nn.ModuleList(SparseMoE(CONFIG, layer_index=i, **sizes) for i in range(3))
        for layer in self.layers:
            layer.reset(std=0.3)
        self.layers[2].requires_grad_(False)
        self.recorder = RoutingRecorder.attach(self, CONFIG)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            inputs_embeds = inputs_embeds + layer(inputs_embeds)
        return inputs_embeds


def batch(step: int, micro_batch: int) -> Tensor:
    """The global batch ``[ROWS, 6, HIDDEN]``; each process takes its share of the rows."""
    generator = torch.Generator().manual_seed(100 * step + micro_batch)
    return torch.randn(ROWS, 6, HIDDEN, generator=generator)


def state(model: nn.Module) -> dict[str, list[Tensor]]:
    graphs = [graph for _, graph in expert_graphs(model)]
    return {"graphs": [g.adjacency_EE.clone() for g in graphs], "updates": [g.num_updates.clone() for g in graphs]}


def train(rank: int, world_size: int) -> list[dict[str, list[Tensor]]]:
    torch.manual_seed(0)
    model = ThreeLayers().train()
    # DDP broadcasts rank 0's buffers at each forward pass (its default); scratch counts must survive that.
    parallel = DistributedDataParallel(model, broadcast_buffers=True) if world_size > 1 else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    states = []
    for step in range(STEPS):
        for micro_batch in range(MICRO_BATCHES):
            rows = batch(step, micro_batch).chunk(world_size)[rank]
            output = parallel(inputs_embeds=rows)
            losses = model.recorder.losses()
            (output.square().mean() + model.recorder.weighted_loss(losses)).backward()
        optimizer.step()
        optimizer.zero_grad()
        update_expert_graphs(model)
        states.append(state(model))
    # A step in which only the first process has anything to do: the others have counted no token at all.
    if rank == 0:
        model(inputs_embeds=batch(STEPS, 0))
    update_expert_graphs(model)
    states.append(state(model))
    # A step in which a process has nothing but padding.
    rows = batch(STEPS, 1)
    mask = torch.ones(rows.shape[:2], dtype=torch.long)
    mask[ROWS // 2 :] = 0
    model(inputs_embeds=rows.chunk(world_size)[rank], attention_mask=mask.chunk(world_size)[rank])
    update_expert_graphs(model)
    states.append(state(model))
    # A step in which a process has a batch of no row; the backward pass waits for nobody.
    rows = batch(STEPS, 2)[: ROWS if rank == 0 else 0]
    output = parallel(inputs_embeds=rows)
    (output.square().sum() + model.recorder.weighted_loss(model.recorder.losses())).backward()
    update_expert_graphs(model)
    states.append(state(model))
    # A step in which nobody has anything: nothing may change, and nobody may wait.
    update_expert_graphs(model)
    states.append(state(model))
    return states


def run_rank(folder: str, rank: int, world_size: int) -> None:
    rendezvous = f"file://{folder}/rendezvous-{world_size}"
    # A process that waits for one that has died must not outlive the test.
    patience = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=patience)
    torch.save(train(rank, world_size), Path(folder) / f"{world_size}-{rank}.pt")
    dist.destroy_process_group()


def main(folder: str, *world_sizes: str) -> int:
    """0 if every process of every run ended well."""
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    jobs = [(folder, rank, int(size)) for size in world_sizes for rank in range(int(size))]
    processes = [context.Process(target=run_rank, args=job) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max(abs(process.exitcode or 0) for process in processes)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
