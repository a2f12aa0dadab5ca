"""torch.compile of a model's layers, in place: no wrapper, so that parameters keep their names."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from symphony_vlm.errors import InputError
from symphony_vlm.moe.layer import SparseMoE

__all__ = ["compile_layers_"]

RECOMPILE_LIMIT = 64


def compile_layers_(model: nn.Module, device: torch.device, *, backend: str = "inductor") -> None:
    """Compiles the transformer layers of transformers' models inside a model, each when it first runs.

    Layer by layer, because all layers of a stack share what is compiled once, and because what the model does around
    them (merging images, recording routers) is Python. Of a layer with experts the other parts are compiled, each by
    itself: routers write records, which activation checkpointing must see happen.

    Args:
        model: whose layers.
        device: where it will train.
        backend: of torch.compile; ``eager`` takes the layers apart and compiles nothing.

    Raises:
        InputError: there are no such layers, or nothing can be compiled on this machine.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(
            f"{type(model).__name__} has no transformer layers of transformers",
            where="stage.compile",
            remedy="Set compile: false.",
        )
    _check_compiler(device, backend)
    # All layers of transformers count as one function here, and what exceeds the limit silently runs uncompiled. There
    # is a version for each class of layers, with and without gradients, for fixed and for varying lengths.
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    tower = getattr(model, "vision_tower", None)
    of_tower = set() if tower is None else set(tower.modules())
    for layer in layers:
        # Conversations are of every length: the first compilation is to be the last. Squares are of one size, and the
        # blocks of text stages of one length.
        dynamic = True if tower is not None and layer not in of_tower else None
        for part in _without_experts(layer):
            part.compile(backend=backend, dynamic=dynamic)


def _without_experts(module: nn.Module) -> Iterator[nn.Module]:
    """The module, or if there are experts in it, the largest parts of it that have none."""
    if not any(isinstance(inner, SparseMoE) for inner in module.modules()):
        if any(True for _ in module.parameters()):
            yield module
    elif not isinstance(module, SparseMoE):
        for child in module.children():
            yield from _without_experts(child)


def _check_compiler(device: torch.device, backend: str) -> None:
    """Compiles one addition: what may be missing (a C++ compiler, Triton, headers) differs by machine."""
    try:
        torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(8, device=device))
    except Exception as error:
        first = str(error).strip().splitlines()
        raise InputError(
            f"torch.compile does not work here: {first[0][:200] if first else type(error).__name__}",
            where="stage.compile",
            remedy="Install a C++ compiler (CPU) or Triton (GPU), or set compile: false.",
        ) from error
