"""Modules that a cast of the whole model leaves in the precision they were built with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["KeepsPrecision"]


class KeepsPrecision(nn.Module):
    """A module that follows ``.to(device)`` but not ``.to(dtype)``, ``.half()``, ``.bfloat16()``, ``.double()``.

    Routers are built in fp32 and stay there: logits in 16 bits change which experts win a close race, and the moving
    average of an expert graph takes steps that bfloat16 would round away.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def same_precision(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.detach().to(applied.device)

        return super()._apply(same_precision, recurse)
