"""Modules that a cast of the whole model leaves in the precision they were built with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["KeepsPrecision", "computing_dtype"]


class KeepsPrecision(nn.Module):
    """A module that follows ``.to(device)`` but not ``.to(dtype)``, ``.half()``, ``.bfloat16()``, ``.double()``.

    Routers are built in fp32 and stay there: logits in 16 bits change which experts win a close race, and the moving
    average of an expert graph takes steps that bfloat16 would round away.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def same_precision(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.detach().to(applied.device)

        return super()._apply(same_precision, recurse)  # type: ignore[no-untyped-call]


def computing_dtype(module: nn.Module) -> torch.dtype:
    """The type that a module takes its input in: that of its weights, routers left aside, which stay in fp32.

    The parts of a model may differ: a frozen one stays in 16 bits where another is trained in fp32.
    """
    dtypes = {parameter.dtype for parameter in module.parameters()}
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes), torch.float32)
