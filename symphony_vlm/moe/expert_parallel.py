"""Expert parallelism: each rank holds some of the experts of every sparse layer, and everything else as it did.

::

    shard_experts_(model, size)                          # before the optimizer is built
    parallel = DistributedDataParallel(model)            # which leaves the shared-out experts alone
    loss.backward(); reduce_expert_gradients_(model); clip_grad_norm_(model, 1.0); optimizer.step()

The shards are plain parameters and not DTensors: torch refuses DTensors beside tensors in one DistributedDataParallel,
one fused optimizer group and one ``clip_grad_norm_``, and all else here is data-parallel. Files hold whole experts, so
that no file tells how many ranks wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from symphony_vlm.errors import InputError
from symphony_vlm.moe.experts import Experts
from symphony_vlm.moe.recording import sparse_layers
from symphony_vlm.moe.token_exchange import ExpertShard

__all__ = [
    "clip_grad_norm_",
    "load_whole_optimizer_state",
    "reduce_expert_gradients_",
    "refuse_shards",
    "shard_experts_",
    "sharded_experts",
    "unshard_experts_",
    "whole_optimizer_state",
    "whole_state_dict",
]


def shard_experts_(model: nn.Module, size: int | None = None) -> None:
    """Keeps of the experts of every sparse layer this rank's share, in place; to be called on every rank.

    Groups of `size` consecutive ranks hold all experts together, E / size a rank; every group holds all of them. The
    model must be the one that `DistributedDataParallel` will wrap, and the same on every rank. From then on every
    forward pass, in training or not, is one of all ranks of a group together.

    Args:
        model: with sparse layers, whole.
        size: ranks that share the experts out; default: all.

    Raises:
        InputError: there is nothing to share out, or it cannot be shared out evenly, or another engine has already
            sharded the parameters.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError("no process group has been initialised", where="expert parallelism", remedy=_LAUNCH)
    world_size = dist.get_world_size()
    size = world_size if size is None else size
    if size < 1 or world_size % size:
        raise InputError(f"{size} does not divide {world_size} processes", where=_SIZE, remedy=_LAUNCH)
    layers = dict(sparse_layers(model))
    if not layers:
        raise InputError("the model has no experts to share out", where=_SIZE, remedy="Set it to 1, or upcycle first.")
    for name, layer in layers.items():
        _check(name, layer.experts, size)
    shard = _make_shard(size, world_size)
    for layer in layers.values():
        experts = layer.experts
        for name, parameter in list(experts.named_parameters(recurse=False)):
            part = nn.Parameter(shard.part_of(parameter.detach()).clone(), requires_grad=parameter.requires_grad)
            setattr(experts, name, part)
        experts.shard = shard
        experts.register_load_state_dict_pre_hook(_take_part)  # type: ignore[no-untyped-call]
    names = [name for name, _, _ in _shards(model)]
    # Marked experimental in torch, and the only way there is (pytorch/pytorch#43690).
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


_SIZE = "expert_parallel_size"
_LAUNCH = "Start a multiple of expert_parallel_size processes, e.g. torchrun --nproc-per-node 2."


def _check(name: str, experts: Experts, size: int) -> None:
    if experts.shard is not None:
        raise InputError(f"the experts of {name} are already shared out", where=_SIZE)
    if experts.num_experts % size:
        problem = f"{experts.num_experts} experts ({name}) cannot be shared out evenly over {size} ranks"
        raise InputError(problem, where=_SIZE, remedy=f"Choose a divisor of {experts.num_experts}.")
    _refuse_other_engines(name, experts)


def _refuse_other_engines(name: str, experts: Experts) -> None:
    for parameter in experts.parameters():
        if hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id"):
            raise InputError(
                f"FSDP2 or DeepSpeed ZeRO-3 has sharded the parameters of {name}; they would mix up different experts",
                where="expert parallelism",
                remedy="Use it with DistributedDataParallel, or without expert parallelism.",
            )


def _make_shard(size: int, world_size: int) -> ExpertShard:
    # Consecutive ranks are on one node: tokens take its short ways, and only gradients, once a step, the long ones.
    owners, _ = dist.new_subgroups(size)
    replicas = None
    if world_size > size:
        same = [list(range(first, world_size, size)) for first in range(size)]
        replicas, _ = dist.new_subgroups_by_enumeration(same)
    return ExpertShard(owners, replicas)


def _take_part(experts: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Of whole experts that are about to be loaded, this rank's."""
    shard = experts.shard
    if isinstance(shard, ExpertShard):
        for name, parameter in experts.named_parameters(recurse=False):
            value = state_dict.get(prefix + name)
            if value is not None and value.shape[0] == parameter.shape[0] * shard.size:
                state_dict[prefix + name] = shard.part_of(value)


def sharded_experts(model: nn.Module) -> Iterator[tuple[str, Experts, ExpertShard]]:
    """The experts that are shared out, with their module names."""
    for name, module in model.named_modules():
        if isinstance(module, Experts) and module.shard is not None:
            yield name, module, module.shard


def _shards(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, ExpertShard]]:
    for name, experts, shard in sharded_experts(model):
        for key, parameter in experts.named_parameters(recurse=False):
            yield f"{name}.{key}", parameter, shard


@torch.no_grad()
def reduce_expert_gradients_(model: nn.Module) -> None:
    """Makes the experts' gradients those of data parallelism; once per optimizer step, before clipping.

    Data parallelism trains on the mean of the ranks' losses: each gradient is 1/W of the sum over the W ranks. The
    backward pass has summed an expert's gradient over the tokens of its group's ranks already. What is missing is the
    sum over the groups (the ranks that hold the same experts, if any), and the division by W.

    Args:
        model: after the last backward pass of the step, on every rank.

    Raises:
        InputError: another engine has sharded the parameters in the meantime.
    """
    for name, experts, shard in sharded_experts(model):
        _refuse_other_engines(name, experts)
        for parameter in experts.parameters():
            if parameter.grad is None and (shard.replicas is None or not parameter.requires_grad):
                continue
            if parameter.grad is None:  # the other groups wait
                parameter.grad = torch.zeros_like(parameter)
            if shard.replicas is not None:
                dist.all_reduce(parameter.grad, group=shard.replicas)
            parameter.grad /= dist.get_world_size()


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """As ``torch.nn.utils.clip_grad_norm_``, with every expert counted once, on every rank.

    Args:
        model: after `reduce_expert_gradients_`.
        max_norm: largest norm of all gradients together.

    Returns:
        The norm before clipping, fp32, the same on every rank.
    """
    mine = {id(parameter) for _, parameter, _ in _shards(model)}
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    square_of: dict[bool, Tensor] = {}
    for is_mine in (True, False):
        gradients = [p.grad for p in parameters if p.grad is not None and (id(p) in mine) == is_mine]
        norm = get_total_norm(gradients)
        square_of[is_mine] = norm.float().to(parameters[0].device).square()
    for shard in {shard for _, _, shard in sharded_experts(model)}:
        dist.all_reduce(square_of[True], group=shard.owners)
    total = (square_of[True] + square_of[False]).sqrt()
    clip_grads_with_norm_(parameters, max_norm, total)
    return total


def refuse_shards(model: nn.Module) -> None:
    """Called before a model is saved as it is.

    Raises:
        InputError: it would be saved with this rank's experts alone.
    """
    if next(sharded_experts(model), None) is not None:
        raise InputError(
            "this rank has only its own experts",
            where="save_pretrained",
            remedy="On every rank call state = whole_state_dict(model), then on the first "
            "model.save_pretrained(folder, state_dict=state).",
        )


@torch.no_grad()
def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """``model.state_dict()`` with all experts, on the first rank; empty on the others. To be called on every rank.

    The experts are gathered one parameter at a time and put into the memory of the CPU.
    """
    state: dict[str, Tensor] = model.state_dict()
    for name, parameter, shard in _shards(model):
        whole = shard.gather(parameter)
        if dist.get_rank() == 0:
            state[name] = whole.cpu()
    return state if dist.get_rank() == 0 else {}


@torch.no_grad()
def unshard_experts_(model: nn.Module) -> None:
    """Gives every rank all experts again, in the memory of the CPU; nothing happens where nothing is shared out.

    ``model.to(device)`` brings them to the others. Optimizers built before hold the shards.
    """
    found = list(sharded_experts(model))
    for _, experts, shard in found:
        for name, parameter in list(experts.named_parameters(recurse=False)):
            whole = nn.Parameter(shard.gather(parameter).cpu(), requires_grad=parameter.requires_grad)
            setattr(experts, name, whole)
        experts.shard = None
    if found:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [])


def _entries(optimizer: Any, model: nn.Module) -> Iterator[tuple[int, nn.Parameter, ExpertShard]]:
    """Shards that an optimizer trains, with their numbers in its state."""
    shard_of = {id(parameter): shard for _, parameter, shard in _shards(model)}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        if id(parameter) in shard_of:
            yield number, parameter, shard_of[id(parameter)]


@torch.no_grad()
def whole_optimizer_state(optimizer: Any, model: nn.Module) -> dict[str, Any]:
    """``optimizer.state_dict()`` of all experts, on the first rank; empty on the others. To be called on every rank.

    Args:
        optimizer: one whose state has tensors of the parameters' shapes, such as Adam's and SGD's.
        model: what it trains.
    """
    state = optimizer.state_dict()
    values = dict(state["state"])
    for number, parameter, shard in _entries(optimizer, model):
        if number not in values:
            continue
        entry = dict(values[number])
        for key, value in entry.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                whole = shard.gather(value)
                entry[key] = whole.cpu() if dist.get_rank() == 0 else None
        values[number] = entry
    return {**state, "state": values} if dist.get_rank() == 0 else {}


def load_whole_optimizer_state(optimizer: Any, model: nn.Module, state: dict[str, Any]) -> None:
    """The way back: gives an optimizer this rank's part of what `whole_optimizer_state` returned on the first.

    Args:
        optimizer: built for `model` as the one that was saved was.
        model: its experts may now be shared out over another number of ranks.
        state: see above, on every rank.
    """
    values = dict(state["state"])
    for number, parameter, shard in _entries(optimizer, model):
        if number not in values:
            continue
        whole_shape = (parameter.shape[0] * shard.size, *parameter.shape[1:])
        values[number] = {
            key: shard.part_of(value) if isinstance(value, Tensor) and value.shape == whole_shape else value
            for key, value in values[number].items()
        }
    optimizer.load_state_dict({**state, "state": values})
