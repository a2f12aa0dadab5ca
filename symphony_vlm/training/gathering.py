"""Makes a model whole again that an engine has spread over processes, so that it is saved as that of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from torch import Tensor, nn

from symphony_vlm.errors import InputError

__all__ = ["frozen_weights", "gather_", "is_sharded", "refuse_empty_tensors"]


def is_sharded(trainer: Any) -> bool:
    """Whether the trainer's engine keeps its weights elsewhere than in the model's parameters (DeepSpeed, FSDP2)."""
    return bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


def frozen_weights(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Weights that do not train and that an engine is about to cast to `dtype`; nobody else would remember them.

    DeepSpeed keeps full precision of what its optimizer has, and nothing else. Not copies: the cast makes one.
    """
    if dtype is None or not PartialState().is_main_process:
        return {}
    frozen = ((name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad)
    return {name: parameter.data for name, parameter in frozen if parameter.dtype != dtype}


@torch.no_grad()
def gather_(model: nn.Module, frozen: dict[str, Tensor]) -> None:
    """Gives a model whole parameters again, in place: on the main process, in its memory and in full precision.

    Every process must call. On the others the model is of no use afterwards; nowhere can it train on.

    Args:
        model: as the engine left it.
        frozen: of `frozen_weights`, before the engine had it.
    """
    main = PartialState().is_main_process
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]  # FSDP2 leaves some parameters together after a pass, perhaps in 16 bits
    whole: dict[Any, nn.Parameter | None] = {}
    for prefix, module in model.named_modules():
        gathered: dict[str, nn.Parameter | None] = {}
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter not in whole:  # tied ones once
                value = _whole(parameter)
                value = frozen.get(f"{prefix}.{name}" if prefix else name, value)
                whole[parameter] = nn.Parameter(value.cpu(), parameter.requires_grad) if main else None
            gathered[name] = None if parameter is None else whole[parameter]
        if main:
            module._parameters = gathered  # a plain dictionary: that of ZeRO-3 looks at every access


def _whole(parameter: Any) -> Tensor:
    if hasattr(parameter, "full_tensor"):
        full: Tensor = parameter.full_tensor()
        return full
    if hasattr(parameter, "ds_id"):
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if master is not None:
            return master
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    if hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter.detach()


def refuse_empty_tensors(folder: Path) -> None:
    """The last look at a saved model.

    Raises:
        InputError: a tensor in it has no element, as a part of a model has that is somewhere else.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            empty = [name for name in file.keys() if 0 in file.get_slice(name).get_shape()]  # noqa: SIM118
        if empty:
            raise InputError(
                f"{len(empty)} tensors would be saved empty ({', '.join(empty[:3])}); the model was not gathered",
                where=str(path),
                remedy="Please report this with the recipe and the engine; the stage's checkpoints are whole.",
            )
