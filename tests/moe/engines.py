"""Training of a tiny language model under the engines that share it out over processes, and by one process.

Started by ``test_expert_graph_engines.py`` as a script: a folder for the results, then the engines to train under. Two
processes train each scenario under its engine, a third trains it alone on the data of both. The libraries are imported
once, then the processes fork.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

# First: torchvision without its compiled operators would break the import of transformers.
import symphony_vlm as sv  # isort: skip
import torch
import torch.distributed as dist
from conftest import VOCAB_SIZE, make_ids, make_language_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from symphony_vlm.moe.expert_graph import expert_graphs, set_expert_graph_
from symphony_vlm.moe.router import Router, register_router
from symphony_vlm.moe.statistics import graph_statistics

STEPS, MICRO_BATCHES, RANKS = 3, 2, 2
PICTURE = -1
"""Stands for the model's image token."""
_spec: Any = spec_from_file_location("tiny_models", Path(__file__).parents[1] / "conftest.py")
IMAGES: Any = module_from_spec(_spec)
"""The tests' own vision-language models."""
_spec.loader.exec_module(IMAGES)
PATIENCE = timedelta(seconds=60)
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"router": name} for name in ("smoe", "xmoe", "glam", "symphony_smoe", "symphony_xmoe", "symphony_glam")},
    **{name: {"router": name} for name in ("similarity_smoe", "attention_smoe")},
    "own": {"router": "scaled_smoe"},
    "learnable": {"router": "smoe", "expert_graph": "learnable"},
    "fixed": {"router": "smoe", "expert_graph": "fixed"},
}


@register_router("scaled_smoe", gate="linear", expert_graph="symphony")
class ScaledRouter(Router):
    """A router of a user's own: its parameter is neither the gate's nor a graph's."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.scale = nn.Parameter(torch.empty(self.config.num_experts, dtype=torch.float32))

    def logits(self, x_TD: Tensor) -> Tensor:
        return super().logits(x_TD) * self.scale.float()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        super().reset(generator)
        self.scale.fill_(3.0)


@dataclass(frozen=True)
class Scenario:
    """One training: which router, under which engine, in which precision."""

    engine: str
    variant: str = "symphony_smoe"
    settings: dict[str, Any] = field(default_factory=dict)
    precision: str = "float32"
    """``float32``, ``autocast`` (bfloat16 where the engine's own mixed precision puts it), or ``bfloat16`` weights."""
    native: bool = False
    images: bool = False
    """A vision-language model with experts everywhere; the first rank has images, the second text alone."""
    checkpointing: bool = False
    routers_apart: bool = False
    """FSDP2: routers are groups of parameters of their own."""

    @property
    def rate(self) -> float:
        """Learning rate. In 16 bits none: a rounding of the averaged gradient would grow into another choice."""
        return 0.1 if self.precision == "float32" else 0.0


SCENARIOS: dict[str, Scenario] = {
    **{f"ddp-{variant}": Scenario("ddp", variant) for variant in VARIANTS},
    "ddp-soft": Scenario("ddp", settings={"counts": "soft"}),
    "ddp-checkpointing": Scenario("ddp", checkpointing=True),
    "ddp-autocast": Scenario("ddp", precision="autocast"),
    "ddp-bfloat16": Scenario("ddp", precision="bfloat16"),
    "ddp-native": Scenario("ddp", native=True),
    **{
        f"fsdp2-{variant}": Scenario("fsdp2", variant)
        for variant in ("symphony_smoe", "symphony_xmoe", "learnable", "own")
    },
    "fsdp2-routers-apart": Scenario("fsdp2", "own", routers_apart=True),
    "fsdp2-images": Scenario("fsdp2", images=True),
    "fsdp2-checkpointing": Scenario("fsdp2", checkpointing=True),
    "fsdp2-autocast": Scenario("fsdp2", precision="autocast"),
    "fsdp2-bfloat16": Scenario("fsdp2", precision="bfloat16", routers_apart=True),
    **{f"zero{stage}-symphony_smoe": Scenario(f"zero{stage}") for stage in (1, 2, 3)},
    **{f"zero3-{variant}": Scenario("zero3", variant) for variant in ("symphony_xmoe", "learnable", "own")},
    "zero3-images": Scenario("zero3", images=True),
    "zero3-checkpointing": Scenario("zero3", checkpointing=True),
    **{f"zero{stage}-bfloat16": Scenario(f"zero{stage}", precision="bfloat16") for stage in (2, 3)},
}


def make_model(scenario: Scenario) -> PreTrainedModel:
    """The same weights in every process. Quick graphs and different experts: what they do must show."""
    settings = {"num_experts": 4, "momentum": 0.5, "strength": 0.9, **VARIANTS[scenario.variant], **scenario.settings}
    if scenario.native:
        sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 4}
        torch.manual_seed(0)
        model: PreTrainedModel = MixtralForCausalLM(MixtralConfig(**sizes, **heads, pad_token_id=0))
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() >= 2:
                    weight.normal_(0.0, 0.3)
        sv.symphonize_(model, sv.MoEConfig(**settings))
    elif scenario.images:
        everywhere = ("language", "projector", "vision")
        model = IMAGES.make_tiny_model(moe=sv.MoEConfig(expert_init_noise=0.5, modules=everywhere, **settings))
    else:
        model = make_language_model()
        sv.upcycle_(model, sv.MoEConfig(expert_init_noise=0.5, **settings))
    if scenario.variant == "fixed":
        rows_EE = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
        set_expert_graph_(model, rows_EE / rows_EE.sum(1, keepdim=True))
    if scenario.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def batch(scenario: Scenario, step: int, micro_batch: int, rank: int) -> dict[str, Tensor]:
    """Rows of different lengths, fewer tokens on the second rank, and once it has nothing but padding."""
    seed = 100 * step + 10 * micro_batch + rank
    ids = make_ids(3, 10, seed=seed)
    if scenario.images and rank == 0:
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(3, 3, IMAGES.IMAGE_SIZE, IMAGES.IMAGE_SIZE, generator=generator)
        ids = torch.cat([torch.full((3, IMAGES.NUM_IMAGE_TOKENS), PICTURE), ids], 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    lengths = torch.tensor([[10], [7], [4]]) if rank == 0 else torch.tensor([[5], [2], [1]])
    if (step, micro_batch, rank) == (1, 0, 1):
        lengths = torch.zeros_like(lengths)
    mask = (torch.arange(10) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def loss_of(model: PreTrainedModel, call: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
    """Next-token loss and router losses; a sum over tokens, since a mean over none would be no number."""
    ids = inputs["input_ids"]
    labels = ids.masked_fill((inputs["attention_mask"] == 0) | (ids == PICTURE), -100)[:, 1:]
    placeholder = getattr(model.config, "image_token_id", PICTURE)
    logits = call(**inputs | {"input_ids": ids.masked_fill(ids == PICTURE, placeholder)}).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum") / 20
    recorder: Any = model.routing
    return loss + recorder.weighted_loss(recorder.losses())


def parts(model: PreTrainedModel) -> Iterator[nn.Module]:
    """What FSDP2 shards by itself."""
    if isinstance(model, sv.SymphonyVLMForConditionalGeneration):
        yield from (model.vision_tower, model.projector, *model.language_model.model.layers)
    else:
        yield from model.model.layers
    yield model


def cast_parameters_(model: nn.Module) -> None:
    """To bfloat16, routers too, as the engines do it that keep fp32 masters elsewhere."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().bfloat16()))


def train_alone(scenario: Scenario) -> list[dict[str, Any]]:
    """The oracle: one process, the micro-batches of all ranks, gradients accumulated over all of them."""
    model = make_model(scenario)
    if scenario.precision == "bfloat16":
        model.to(torch.bfloat16)
    if (scenario.engine, scenario.precision) in {
        ("fsdp2", "autocast"),
        ("zero2", "bfloat16"),
        ("zero3", "bfloat16"),
    }:
        cast_parameters_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=scenario.rate)
    states = []
    for step in range(STEPS):
        for micro_batch in range(MICRO_BATCHES):
            for rank in range(RANKS):
                with autocast(scenario):
                    loss = loss_of(model, model, batch(scenario, step, micro_batch, rank))
                (loss / (MICRO_BATCHES * RANKS)).backward()
        optimizer.step()
        optimizer.zero_grad()
        sv.update_expert_graphs(model)
        states.append(state(model))
    return states


def train_ddp(scenario: Scenario, rank: int) -> list[dict[str, Any]]:
    """Two processes; gradients are averaged at the last micro-batch."""
    model = make_model(scenario)
    if scenario.precision == "bfloat16":
        model.to(torch.bfloat16)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=scenario.rate)
    states = []
    for step in range(STEPS):
        for micro_batch in range(MICRO_BATCHES):
            last = micro_batch == MICRO_BATCHES - 1
            with nullcontext() if last else parallel.no_sync():
                with autocast(scenario):
                    loss = loss_of(model, parallel, batch(scenario, step, micro_batch, rank))
                (loss / MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()
        sv.update_expert_graphs(parallel)
        states.append(state(model))
    return states


def train_fsdp2(scenario: Scenario, rank: int) -> list[dict[str, Any]]:
    """Decoder layers sharded one by one; in 16 bits routers too, as a group of parameters must have one precision."""
    mesh = init_device_mesh("cpu", (RANKS,))
    model = make_model(scenario)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if scenario.precision == "autocast" else None)
    if scenario.precision == "bfloat16":
        model.to(torch.bfloat16)
    if scenario.routers_apart:
        for layer in model.model.layers:
            fully_shard(layer.mlp.router, mesh=mesh)
    for part in parts(model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=scenario.rate)
    states = []
    for step in range(STEPS):
        for micro_batch in range(MICRO_BATCHES):
            model.set_requires_gradient_sync(micro_batch == MICRO_BATCHES - 1)
            loss = loss_of(model, model, batch(scenario, step, micro_batch, rank))
            (loss / MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()
        sv.update_expert_graphs(model)
        states.append(state(model))
    return states


def train_zero(scenario: Scenario, rank: int, folder: Path) -> list[dict[str, Any]]:
    """DeepSpeed; the last step is done twice, the second time from a checkpoint in another engine."""
    import deepspeed

    deepspeed.init_distributed("gloo", dist_init_required=False)
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": MICRO_BATCHES,
        # 0: even the smallest parameter, a gate or a learnable graph, is partitioned.
        "zero_optimization": {"stage": int(scenario.engine[-1]), "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,
        "bf16": {"enabled": scenario.precision == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }

    def start() -> Any:
        model = make_model(scenario)
        optimizer = torch.optim.SGD(model.parameters(), lr=scenario.rate)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    def one_step(engine: Any, step: int) -> dict[str, Any]:
        for micro_batch in range(MICRO_BATCHES):
            engine.backward(loss_of(engine.module, engine, batch(scenario, step, micro_batch, rank)))
            engine.step()
        sv.update_expert_graphs(engine)
        return state(engine.module)

    engine = start()
    states = [one_step(engine, step) for step in range(STEPS - 1)]
    engine.save_checkpoint(str(folder), tag="second", client_state={})
    states.append(one_step(engine, STEPS - 1))
    continued = start()
    continued.load_checkpoint(str(folder), tag="second")
    states.append(one_step(continued, STEPS - 1))
    return states


def autocast(scenario: Scenario) -> Any:
    """Mixed precision of PyTorch's own, where the engine has none."""
    enabled = scenario.engine == "ddp" and scenario.precision == "autocast"
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def state(model: nn.Module) -> dict[str, Any]:
    """Graphs, numbers of updates, and all weights, whole."""
    graphs = [graph for _, graph in expert_graphs(model)]
    return {
        "graphs": [graph.whole_adjacency().clone() for graph in graphs],
        "updates": [int(graph.num_updates) for graph in graphs],
        "statistics": graph_statistics(model),
        "weights": {name: whole(parameter).detach().clone() for name, parameter in model.named_parameters()},
    }


@torch.no_grad()
def whole(parameter: Any) -> Tensor:
    """A parameter that an engine may have sharded."""
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.clone()
    return parameter


def run_rank(folder: str, rank: int, world_size: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    results = {}
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        rendezvous = f"file://{folder}/rendezvous"
        # A process that waits for one that has died must not outlive the test.
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=PATIENCE)
    for name in names:
        scenario = SCENARIOS[name]
        if world_size == 1:
            results[name] = train_alone(scenario)
        elif scenario.engine == "ddp":
            results[name] = train_ddp(scenario, rank)
        elif scenario.engine == "fsdp2":
            results[name] = train_fsdp2(scenario, rank)
        else:
            results[name] = train_zero(scenario, rank, Path(folder) / name)
    torch.save(results, Path(folder) / f"{world_size}-{rank}.pt")
    if world_size > 1:
        dist.destroy_process_group()


def main(folder: str, *engines: str) -> int:
    """0 if every process ended well."""
    names = [name for name, scenario in SCENARIOS.items() if scenario.engine in engines]
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if any(engine.startswith("zero") for engine in engines):
        os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"}
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    jobs = [(folder, rank, size, names) for size in (RANKS, 1) for rank in range(size)]
    processes = [context.Process(target=run_rank, args=job) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max(abs(process.exitcode or 0) for process in processes)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
