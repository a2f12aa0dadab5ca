"""Memory of large gradients on a CPU, which the next backward pass uses again."""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch import Tensor

__all__ = ["GradientMemory"]

_LARGE = 32 * 2**20
"""Bytes from which on glibc gives all memory back to the system when it is freed, whatever was asked for before. Taken
anew, it comes page by page and zeroed, which takes longer than computing a small expert's gradient."""
_ALIGNMENT = 64
"""Of torch's own memory: what a matrix product rounds can hang on it."""


class GradientMemory:
    """Keeps the memory of one layer's large gradients between steps, and gives it out once nobody holds it any more.

    A gradient is an ordinary tensor. As long as it, or any view of it, is alive (``parameter.grad`` until
    ``zero_grad``, whatever somebody kept), the next one gets other memory.
    """

    def __init__(self) -> None:
        # By place: the memory, and what every tensor in it holds, wherever it is passed on to.
        self._blocks: dict[int, tuple[np.ndarray, weakref.ref[np.ndarray]]] = {}

    def empty_like(self, place: int, like: Tensor) -> Tensor:
        """An uninitialised contiguous tensor of that shape, type and device.

        Args:
            place: which of the layer's gradients it is.
            like: usually the parameter.
        """
        num_bytes = like.numel() * like.element_size()
        if like.device.type != "cpu" or num_bytes < _LARGE:
            return torch.empty_like(like, memory_format=torch.contiguous_format)
        block, held = self._blocks.get(place, (np.empty(0, np.uint8), None))
        if len(block) != num_bytes + _ALIGNMENT or (held is not None and held() is not None):
            block = np.empty(num_bytes + _ALIGNMENT, np.uint8)
        start = -block.ctypes.data % _ALIGNMENT
        part = block[start : start + num_bytes]
        self._blocks[place] = (block, weakref.ref(part))
        return torch.from_numpy(part).view(like.dtype).view(like.shape)

    def __deepcopy__(self, memo: object) -> GradientMemory:
        return GradientMemory()

    def __reduce__(self) -> tuple[type[GradientMemory], tuple[()]]:
        return GradientMemory, ()
