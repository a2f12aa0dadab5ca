"""What happens when numbers stop being finite: the step is left out, a warning says where, and then the run stops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from symphony_vlm.moe.router import NOT_FINITE
from symphony_vlm.training.stage_warnings import StageWarnings

__all__ = ["Diverged", "DivergenceWatch"]

REMEDY = (
    "Try a lower learning rate, more warm-up, or a smaller max_grad_norm; bf16 instead of fp16; and look for broken "
    "images or texts with `symphony-vlm data check`."
)


class Diverged(RuntimeError):
    """Training cannot go on: losses, gradients or weights are not finite."""


class DivergenceWatch(TrainerCallback):
    """Looks at the loss and the gradient norm of every optimizer step, and at the weights before they are saved.

    A step that is not finite does not change the weights; after a number of them in a row the run stops.

    Args:
        warnings: gets one for the first such step.
        stop_after: how many steps in a row.
        last_saved: the step of the last finished checkpoint, 0 without one.
        stage: names it in the error.
    """

    def __init__(self, warnings: StageWarnings, *, stop_after: int, last_saved: Callable[[], int], stage: str) -> None:
        self._warnings = warnings
        self._stop_after = stop_after
        self._last_saved = last_saved
        self._stage = stage
        self._losses: list[Tensor] = []
        self._parts: list[Mapping[str, Tensor]] = []
        self._in_a_row = 0

    @contextmanager
    def forward(self, step: int) -> Iterator[None]:
        """Around a forward pass: a router that refuses to route ends the run with a message that says what to do."""
        try:
            yield
        except RuntimeError as error:
            if NOT_FINITE not in str(error):
                raise
            layer, _, _ = str(error).partition(":")
            self._warnings.give("not_finite", step, f"{layer}: {NOT_FINITE}.", REMEDY, layer=layer)
            raise self._stop(f"in step {step} {layer}: {NOT_FINITE}") from error

    def note(self, loss: Tensor, parts: Mapping[str, Tensor] | None) -> None:
        """Takes a micro-batch's loss and its parts; nothing is read from the device yet."""
        self._losses.append(loss.detach())
        self._parts.append(parts or {})

    def check(self, model: nn.Module, grad_norm: Tensor | float | None, step: int, *, is_taken: bool) -> None:
        """After the backward pass of a step, before the optimizer's.

        Args:
            model: loses its gradients if the step is to be left out, so that the optimizer does nothing.
            grad_norm: of all processes.
            step: the number of the step.
            is_taken: whether the optimizer has already moved, as DeepSpeed's does in the backward pass.

        Raises:
            Diverged: too many steps in a row were not finite, or one that cannot be left out.
        """
        values = [loss.float().sum() for loss in self._losses]
        norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm)
        norm = getattr(norm, "full_tensor", lambda: norm)()
        if values:
            values.append(norm.to(values[0].device).float())
        finite = torch.stack(values or [norm]).isfinite().all()
        losses, parts = self._losses, self._parts
        self._losses, self._parts = [], []
        # The only place where a step waits for the device: a weight once spoilt cannot be mended.
        if _all_agree(finite):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        what = _fault(losses, parts, norm)
        if not is_taken:
            model.zero_grad(set_to_none=True)
        message = f"{what}; the weights stay as they were."
        self._warnings.give("not_finite", step, message, REMEDY, in_a_row=self._in_a_row)
        if is_taken:
            raise self._stop(f"in step {step} {what}, and the engine has already changed the weights")
        if self._in_a_row >= self._stop_after:
            raise self._stop(f"in {self._in_a_row} steps in a row, the last of them {step}, {what}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The Trainer's own callback, the first in line, has already decided.
        if not control.should_save:
            return
        weights = [_local(p).isfinite().all() for p in kwargs["model"].parameters() if p.requires_grad]
        if weights and not _all_agree(torch.stack(weights).all()):
            raise self._stop(f"after step {state.global_step} there are weights that are not finite; nothing is saved")

    def _stop(self, what: str) -> Diverged:
        saved = self._last_saved()
        good = (
            f"{self._stage}/checkpoint-{saved} is the last good checkpoint" if saved else "there is no checkpoint yet"
        )
        return Diverged(f"{self._stage}: training has diverged: {what}. {REMEDY} In this run, {good}.")


def _fault(losses: list[Tensor], parts: list[Mapping[str, Tensor]], norm: Tensor) -> str:
    """What is not finite, in this process."""
    names = [name for found in parts for name, value in found.items() if not bool(value.isfinite().all())]
    if names:
        return f"not finite: {', '.join(dict.fromkeys(names))} (parts of the loss)"
    if any(not bool(loss.isfinite().all()) for loss in losses):
        return "the loss is not finite"
    if not bool(norm.isfinite()):
        return f"the loss is finite, but the gradient norm is {float(norm)}"
    return "another process has a loss that is not finite"


def _all_agree(good: Tensor) -> bool:
    """Whether it is so in every process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        bad = (~good).int()
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        return not bool(bad)
    return bool(good)


def _local(parameter: nn.Parameter) -> Tensor:
    """This process's share of a parameter that FSDP2 or ZeRO-3 has spread."""
    shard = getattr(parameter, "ds_tensor", parameter)
    local: Tensor = shard.to_local() if hasattr(shard, "to_local") else shard
    return local.detach()
