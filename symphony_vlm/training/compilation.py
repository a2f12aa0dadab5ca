"""torch.compile of a model's layers, in place: no wrapper, so that parameters keep their names."""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from symphony_vlm.errors import InputError

__all__ = ["compile_layers_"]


def compile_layers_(model: nn.Module, device: torch.device, *, backend: str = "inductor") -> None:
    """Compiles the transformer layers of transformers' models inside a model, each when it first runs.

    Layer by layer, because all layers of a stack share what is compiled once, and because what the model does around
    them (merging images, recording routers) is Python. A sparse layer runs in parts: how many tokens an expert gets is
    known only when they are counted.

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
    for layer in layers:
        layer.compile(backend=backend)


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
