"""How a command that computes on a CPU treats the memory of tensors that it has freed."""

from __future__ import annotations

import ctypes
import os

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""
_OWN_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory() -> None:
    """Keeps freed memory in the process, for the next tensor.

    glibc gives the memory of a large tensor, such as a batch's logits, back to the system as soon as it is freed, and
    the next one comes page by page and zeroed: a fourth of all processor time of a small model's training step. The
    process then holds as much as it ever needed until it ends, so this is for commands whose process is their own.

    Does nothing with a GPU, where the large tensors are elsewhere, with another allocator than glibc's, or where the
    environment already says how to treat memory.
    """
    import torch

    if torch.cuda.is_available() or any(name in os.environ for name in _OWN_SETTINGS):
        return
    mallopt = getattr(ctypes.CDLL(None) if os.name == "posix" else None, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
