"""Activation checkpointing of some of a model's layers: which ones, is a matter of how much memory there is.

A checkpointed layer keeps its input alone and runs again in the backward pass, a quarter of all arithmetic if every
layer does. What fits without should go without.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from symphony_vlm.errors import InputError

__all__ = ["checkpoint_layers_"]


def checkpoint_layers_(model: nn.Module, parts: Sequence[str], *, every: int = 1) -> None:
    """Lets the layers of some parts of a model be checkpointed, and no others.

    Args:
        model: what trains.
        parts: names of its modules, such as ``vision_tower``; the empty name stands for all of it.
        every: only each n-th layer of a part, beginning with its first.

    Raises:
        InputError: a part has no layers that can be checkpointed.
    """
    chosen: set[nn.Module] = set()
    for part in parts:
        layers = _layers(model.get_submodule(part))
        if not layers or not isinstance(model, PreTrainedModel):
            raise InputError(
                f"{part or type(model).__name__} has no layers of transformers, and only those can be checkpointed",
                where="stage.gradient_checkpointing",
                remedy="Leave that part out, or set gradient_checkpointing: false.",
            )
        chosen.update(layers[::every])
    # Reentrant checkpointing would hide the router's logits from the losses. transformers renamed the method.
    settings = {"use_reentrant": False}
    assert isinstance(model, PreTrainedModel)
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    for layer in _layers(model):
        layer.gradient_checkpointing = layer in chosen


def _layers(module: nn.Module) -> list[GradientCheckpointingLayer]:
    return [found for found in module.modules() if isinstance(found, GradientCheckpointingLayer)]
