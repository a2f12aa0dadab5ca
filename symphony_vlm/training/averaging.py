"""An exponential moving average of the weights that train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from symphony_vlm.errors import InputError
from symphony_vlm.training.checkpoints import checkpoint_folder

__all__ = ["WeightAverage", "refuse_sharded"]

FILE = "average.safetensors"


class WeightAverage(TrainerCallback):
    """``average = decay * average + (1 - decay) * weight`` after each optimizer step, in fp32, from the first weights.

    Only parameters that train have one. Expert graphs, which are moving averages already, are left as they are.

    Args:
        decay: 0.999 averages over about the last 1000 steps.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._averages: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_sharded(kwargs["model"], "ema_decay")
        for name, parameter in _trainable(kwargs["model"]):
            known = self._averages.get(name)
            weight = parameter.detach().float().clone()
            self._averages[name] = weight if known is None else known.to(parameter.device)

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for name, parameter in _trainable(kwargs["model"]):
            self._averages[name].lerp_(parameter.float(), 1 - self._decay)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Every process has the same.
        if state.is_world_process_zero:
            save_file(self._averages, checkpoint_folder(args, state) / FILE)

    def restore(self, checkpoint: Path) -> None:
        """Goes on from the averages in a checkpoint."""
        self._averages = load_file(checkpoint / FILE)

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """The model with the averages for weights, for a while."""
        trained = list(_trainable(model))
        weights = [parameter.data for _, parameter in trained]
        try:
            for name, parameter in trained:
                parameter.data = self._averages[name].to(parameter.dtype)
            yield
        finally:
            for (_, parameter), weight in zip(trained, weights, strict=True):
                parameter.data = weight

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Gives the model the averages for good."""
        for name, parameter in _trainable(model):
            parameter.copy_(self._averages[name])


def refuse_sharded(model: nn.Module, setting: str) -> None:
    """Refuses a setting that needs whole parameters on every process.

    Raises:
        InputError: ZeRO-3 or FSDP2 has sharded the model.
    """
    if any(hasattr(parameter, "ds_id") or hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise InputError(
            "ZeRO-3 and FSDP leave each process a part of the parameters, and this needs them whole",
            where=f"stage.{setting}",
            remedy="Use ZeRO-2 or plain data parallelism, or leave the setting out.",
        )


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
