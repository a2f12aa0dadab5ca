"""Training a stage with the experts shared out over the processes: gradients, and checkpoints that hold them whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from symphony_vlm.errors import InputError
from symphony_vlm.moe.expert_parallel import (
    clip_grad_norm_,
    load_whole_optimizer_state,
    reduce_expert_gradients_,
    whole_optimizer_state,
    whole_state_dict,
)
from symphony_vlm.training.trainer import StageTrainer

__all__ = ["ExpertParallelTrainer"]


class ExpertParallelTrainer(StageTrainer):
    """Trainer of a model whose experts `shard_experts_` has shared out; arguments as of `StageTrainer`.

    Its checkpoints are those that `StageTrainer` writes: whole experts, and a whole optimizer state.

    Raises:
        InputError: an engine other than DistributedDataParallel is at work.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        engine = self.accelerator.distributed_type
        if not engine.value.startswith("MULTI_"):
            raise InputError(
                f"experts are shared out beside DistributedDataParallel alone, not {engine.value}",
                where="stage.expert_parallel_size",
                remedy="Set it to 1, or train with the engine ddp.",
            )

    def _clip(self, model: nn.Module) -> Tensor:
        reduce_expert_gradients_(self.model)
        return clip_grad_norm_(self.model, self.args.max_grad_norm)

    def _saves_together(self) -> bool:
        return True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Gathers the experts on all processes; the first writes them."""
        state = whole_state_dict(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = whole_optimizer_state(self.optimizer, self.model)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        # Into the memory of the CPU, and not that of the accelerator, where all experts may have no place.
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        load_whole_optimizer_state(self.optimizer, self.model, state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
