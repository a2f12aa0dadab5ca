"""Processes that share experts out, and what they compute; started by ``test_expert_parallel.py`` as a script.

The argument is a folder for the results. Two processes compute single layers and train models; four train one with two
groups that hold the same experts; one does each alone with the data of all: the oracle. The libraries are imported
once, then the processes fork.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

# First: torchvision without its compiled operators would break the import of transformers.
import symphony_vlm as sv  # isort: skip
import torch
import torch.distributed as dist
from conftest import make_ids
from engines import MICRO_BATCHES, PATIENCE, Scenario, batch, loss_of, make_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import expert_graphs
from symphony_vlm.moe.expert_parallel import (
    clip_grad_norm_,
    load_whole_optimizer_state,
    reduce_expert_gradients_,
    shard_experts_,
    sharded_experts,
    unshard_experts_,
    whole_optimizer_state,
    whole_state_dict,
)
from symphony_vlm.moe.layer import SparseMoE

HIDDEN, EXPERTS, STEPS, SAVED, MAX_NORM = 16, 4, 5, 3, 0.5
TOKENS = (13, 6)
FORMS: dict[str, dict[str, Any]] = {
    "gated": {"hidden_act": "silu"},
    "gated with biases": {"hidden_act": "gelu_pytorch_tanh", "bias": True},
    "plain": {"hidden_act": "gelu", "gated": False},
    "plain with biases": {"hidden_act": "quick_gelu", "gated": False, "bias": True},
}
IMPLEMENTATIONS = {form: ["segments", "grouped_mm", "batched_mm"] for form in FORMS}
IMPLEMENTATIONS["gated"].append("fused")  # knows no other form
ROUTINGS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "even": lambda rank, _: (torch.arange(12)[:, None] + torch.arange(2)) % EXPERTS,
    "uneven": lambda rank, generator: torch.rand(TOKENS[rank], EXPERTS, generator=generator).argsort(-1)[:, :2],
    "one expert": lambda rank, _: torch.full((TOKENS[rank], 1), 3),
    "the second rank's experts": lambda rank, _: torch.tensor([[3, 2]] * TOKENS[rank]),
    "no token on the second rank": lambda rank, _: torch.tensor([[0, 3]] * TOKENS[0])[: TOKENS[0] * (1 - rank)],
    "no token at all": lambda rank, _: torch.empty(0, 2, dtype=torch.long),
}
SCENARIOS = {
    "symphony": Scenario("ddp"),
    "checkpointing": Scenario("ddp", checkpointing=True),
    "native": Scenario("ddp", native=True),
    "shared expert": Scenario("ddp", settings={"shared_expert": True}),
    "images": Scenario("ddp", images=True),
    "images, all frozen but the projector": Scenario("ddp", images=True, checkpointing=True),
    "images, the language model alone trains": Scenario("ddp", images=True),
}


def make_layer(form: str, implementation: str, *, shared: bool = False) -> SparseMoE:
    """The same in every process."""
    config = MoEConfig(num_experts=EXPERTS, experts_implementation=implementation, router="smoe")
    shared_expert = nn.Linear(HIDDEN, HIDDEN) if shared else None
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": 24, "layer_index": 0}
    layer = SparseMoE(config, shared_expert=shared_expert, **sizes, **FORMS[form])
    layer.reset(std=0.3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return layer


def tokens(routing: str, rank: int) -> dict[str, Tensor]:
    """Tokens of a rank, where they go, and the direction in which the output is differentiated."""
    generator = torch.Generator().manual_seed(1 + rank)
    indices_TK = ROUTINGS[routing](rank, generator)
    draw = [torch.randn(len(indices_TK), HIDDEN, generator=generator) for _ in range(2)]
    weights_TK = torch.rand(indices_TK.shape, generator=generator)
    return {"x": draw[0], "weights": weights_TK, "indices": indices_TK, "direction": draw[1]}


def run_experts(layer: SparseMoE, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients of the experts with a given routing; the experts' own gradients are left in place."""
    x_TD, weights_TK = inputs["x"].clone().requires_grad_(), inputs["weights"].clone().requires_grad_()
    y_TO = layer.experts(x_TD, weights_TK, inputs["indices"])
    (y_TO * inputs["direction"]).sum().backward()
    assert x_TD.grad is not None and weights_TK.grad is not None
    return {"output": y_TO.detach(), "x": x_TD.grad, "weights": weights_TK.grad}


def run_layer(layer: Callable[[Tensor], Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with the layer's own router, and its shared expert."""
    x_TD = inputs["x"].clone().requires_grad_()
    y_TO = layer(x_TD)
    (y_TO * inputs["direction"]).sum().backward()
    assert x_TD.grad is not None
    return {"output": y_TO.detach(), "x": x_TD.grad}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """All of them, whole. To be called on every rank."""
    shards = {f"{name}.{key}": shard for name, experts, shard in sharded_experts(model) for key in experts._parameters}
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: shards[name].gather(grad) if name in shards else grad for name, grad in found.items()}


def compute_layers(rank: int) -> dict[str, Any]:
    """Experts with every form, implementation and routing, and whole layers, on this rank's tokens."""
    results: dict[str, Any] = {}
    for form in FORMS:
        for implementation in IMPLEMENTATIONS[form]:
            layer = make_layer(form, implementation)
            shard_experts_(layer)
            for routing in ROUTINGS:
                layer.zero_grad()
                result = run_experts(layer, tokens(routing, rank))
                reduce_expert_gradients_(layer)
                results[f"{form}/{implementation}/{routing}"] = result | gradients(layer)
    for shared in (False, True):
        layer = make_layer("gated", "auto", shared=shared)
        shard_experts_(layer)
        result = run_layer(DistributedDataParallel(layer), tokens("uneven", rank))
        reduce_expert_gradients_(layer)
        norm = clip_grad_norm_(layer, MAX_NORM)
        results["shared expert" if shared else "layer"] = result | {"norm": norm} | gradients(layer)
    results |= sixteen_bits([tokens("uneven", rank)])
    layer = make_layer("gated", "auto").requires_grad_(False)
    shard_experts_(layer)
    inputs = tokens("uneven", rank)
    x_TD = inputs["x"].clone().requires_grad_(rank == 0)
    (layer.experts(x_TD, inputs["weights"], inputs["indices"]) * inputs["direction"]).sum().backward()
    results["only the first rank's tokens have a gradient"] = x_TD.grad
    return results


def sixteen_bits(parts: list[dict[str, Tensor]]) -> dict[str, Any]:
    layer = make_layer("gated", "auto").to(torch.bfloat16)
    if dist.is_initialized():
        shard_experts_(layer)
    inputs = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    inputs = {key: value.bfloat16() if key in ("x", "direction") else value for key, value in inputs.items()}
    result = run_experts(layer, inputs)
    return {"bfloat16": result | gradients(layer)}


def compute_layers_alone() -> dict[str, Any]:
    """The oracle: whole layers on the tokens of both ranks, one after the other; gradients as their mean."""
    results: dict[str, Any] = {}

    def both(routing: str) -> dict[str, Tensor]:
        parts = [tokens(routing, rank) for rank in range(2)]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def halve(layer: SparseMoE) -> SparseMoE:
        for parameter in layer.parameters():
            if parameter.grad is not None:
                parameter.grad /= 2
        return layer

    for form in FORMS:
        for implementation in IMPLEMENTATIONS[form]:
            for routing in ROUTINGS:
                # An implementation of transformers' that cannot do nothing is compared with one that can.
                able = "segments" if routing == "no token at all" else implementation
                layer = make_layer(form, able)
                result = run_experts(layer, both(routing))
                results[f"{form}/{implementation}/{routing}"] = result | gradients(halve(layer))
    results |= sixteen_bits([tokens("uneven", rank) for rank in range(2)])
    for shared in (False, True):
        layer = make_layer("gated", "auto", shared=shared)
        result = run_layer(layer, both("uneven"))
        norm = torch.nn.utils.clip_grad_norm_(halve(layer).parameters(), MAX_NORM)
        results["shared expert" if shared else "layer"] = result | {"norm": norm} | gradients(layer)
    return results


def freeze(model: nn.Module, name: str) -> None:
    for key, parameter in model.named_parameters():
        if "frozen" in name:
            parameter.requires_grad_(key.startswith("projector.") and ".experts." not in key)
        if "alone" in name:
            parameter.requires_grad_(key.startswith("language_model."))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with a large epsilon: its step for a gradient of nothing but rounding is then small too."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=0.02, eps=1e-3, weight_decay=0.1)


def state_of(model: nn.Module, loss: float, norm: Tensor) -> dict[str, Any]:
    graphs = [graph.adjacency_EE.clone() for _, graph in expert_graphs(model)]
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {"loss": loss, "norm": norm, "graphs": graphs, "own": own, "whole": clone(whole_or_own(model))}


def whole_or_own(model: nn.Module) -> dict[str, Tensor]:
    return whole_state_dict(model) if dist.is_initialized() else model.state_dict()


def clone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def train_shared_out(name: str, rank: int, size: int, folder: Path) -> list[dict[str, Any]]:
    """Data-parallel training with the experts shared out; the last steps are done again from what was saved."""
    scenario = SCENARIOS[name]
    states = []

    def start() -> tuple[Any, Any, Any]:
        model = make_model(scenario)
        freeze(model, name)
        shard_experts_(model, size)
        return model, DistributedDataParallel(model, find_unused_parameters=True), optimizer_of(model)

    def train(model: Any, parallel: Any, optimizer: Any, steps: range) -> None:
        for step in steps:
            total = torch.zeros(())
            for micro_batch in range(MICRO_BATCHES):
                with nullcontext() if micro_batch == MICRO_BATCHES - 1 else parallel.no_sync():
                    loss = loss_of(model, parallel, batch(scenario, step, micro_batch, rank))
                    (loss / MICRO_BATCHES).backward()
                total += loss.detach() / (MICRO_BATCHES * dist.get_world_size())
            reduce_expert_gradients_(model)
            norm = clip_grad_norm_(model, MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
            sv.update_expert_graphs(model)
            dist.all_reduce(total)
            states.append(state_of(model, float(total), norm))
            if step == SAVED - 1:
                saved = {"model": whole_state_dict(model), "optimizer": whole_optimizer_state(optimizer, model)}
                if rank == 0:
                    torch.save(saved, folder / "saved.pt")
                dist.barrier()

    trained = start()
    train(*trained, range(STEPS))
    continued = start()
    saved = torch.load(folder / "saved.pt")
    continued[0].load_state_dict(saved["model"])
    load_whole_optimizer_state(continued[2], continued[0], saved["optimizer"])
    train(*continued, range(SAVED, STEPS))
    return states


def train_alone(name: str, ranks: int, saved: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The oracle: plain torch, one process, the micro-batches of all ranks."""
    scenario = SCENARIOS[name]
    model = make_model(scenario)
    freeze(model, name)
    optimizer = optimizer_of(model)
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    states = []
    for step in range(STEPS if saved is None else STEPS - SAVED):
        total = 0.0
        for micro_batch in range(MICRO_BATCHES):
            for rank in range(ranks):
                number = step if saved is None else step + SAVED
                loss = loss_of(model, model, batch(scenario, number, micro_batch, rank)) / (MICRO_BATCHES * ranks)
                loss.backward()
                total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        sv.update_expert_graphs(model)
        states.append(state_of(model, total, norm))
    return states


def save_and_copy(rank: int, folder: Path) -> dict[str, Any]:
    """A saved model with its logits, those of a copy, and the weights after the experts have come together again."""
    model = make_model(SCENARIOS["symphony"]).eval()
    before = clone(model.state_dict())
    shard_experts_(model)
    state = whole_state_dict(model)
    if rank == 0:
        model.save_pretrained(folder / "model", state_dict=state)
    with torch.no_grad():
        logits = model(make_ids(2, 7)).logits
        of_copy = copy.deepcopy(model)(make_ids(2, 7)).logits
    unshard_experts_(model)
    with torch.no_grad():
        again = model(make_ids(2, 7)).logits
    return {"before": before, "after": clone(model.state_dict()), "logits": [logits, of_copy, again]}


def run_document(folder: Path) -> None:
    """The training loop of docs/expert-parallel.md."""
    document = (Path(__file__).parents[2] / "docs" / "expert-parallel.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", document, flags=re.DOTALL)
    ids = make_ids(2, 9, seed=dist.get_rank())
    names = {"sv": sv, "torch": torch, "DistributedDataParallel": DistributedDataParallel}
    batches = [{"input_ids": ids, "labels": ids}] * 2
    os.chdir(folder)
    exec(block, names | {"language_model": make_model(SCENARIOS["symphony"]), "batches": batches})


def refusals() -> dict[str, str]:
    """Messages by what is refused."""

    def sharded() -> SparseMoE:
        layer = make_layer("gated", "auto")
        shard_experts_(layer)
        return layer

    def with_fsdp() -> None:
        layer = make_layer("gated", "auto")
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        shard_experts_(layer)

    def with_fsdp_afterwards() -> None:
        layer = sharded()
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        reduce_expert_gradients_(layer)

    def save() -> None:
        model = make_model(SCENARIOS["symphony"])
        shard_experts_(model)
        model.save_pretrained("nowhere")

    def three_experts() -> None:
        sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "hidden_act": "silu", "layer_index": 0}
        shard_experts_(SparseMoE(MoEConfig(num_experts=3, router="smoe"), **sizes))

    cases: dict[str, Callable[[], Any]] = {
        "size": lambda: shard_experts_(make_layer("gated", "auto"), 3),
        "three experts": three_experts,
        "dense": lambda: shard_experts_(nn.Linear(2, 2)),
        "twice": lambda: shard_experts_(sharded()),
        "fsdp": with_fsdp,
        "fsdp afterwards": with_fsdp_afterwards,
        "save": save,
    }
    messages = {}
    for name, case in cases.items():
        try:
            case()
        except sv.InputError as error:
            messages[name] = str(error)
    return messages


def run_rank(folder: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        rendezvous = f"file://{folder}/rendezvous-{world_size}"
        # A process that waits for one that has died must not outlive the test.
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=PATIENCE)
    results: dict[str, Any] = {}
    if world_size == 1:
        results["layers"] = compute_layers_alone()
        results["training"] = {name: train_alone(name, ranks=2) for name in SCENARIOS}
        results["replicas"] = train_alone("symphony", ranks=4)
    elif world_size == 2:
        results["layers"] = compute_layers(rank)
        results["refusals"] = refusals()
        results["saved"] = save_and_copy(rank, folder)
        run_document(folder)
        results["training"] = {}
        for name in SCENARIOS:
            (folder / name).mkdir(exist_ok=True)
            results["training"][name] = train_shared_out(name, rank, 2, folder / name)
    else:
        (folder / "four").mkdir(exist_ok=True)
        results["replicas"] = train_shared_out("symphony", rank, 2, folder / "four")
    torch.save(results, folder / f"{world_size}-{rank}.pt")
    if world_size > 1:
        dist.destroy_process_group()


def main(folder: str) -> int:
    """0 if every process ended well."""
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    processes = [
        context.Process(target=run_rank, args=(Path(folder), rank, size)) for size in (2, 4, 1) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = max(abs(process.exitcode or 0) for process in processes)
    if not failed:
        continued = train_alone("symphony", ranks=2, saved=torch.load(Path(folder) / "symphony" / "saved.pt"))
        torch.save(continued, Path(folder) / "continued.pt")
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
