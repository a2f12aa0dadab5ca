"""Failures of writing, told from other faults, and agreed upon by all processes so that none waits for another."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError

__all__ = ["attempt", "first_failure", "free_bytes", "several_processes", "size_text"]


def attempt(write: Callable[[], object]) -> str | None:
    """Calls `write`. Returns what kept it from writing: a full disk, a quota, a file system that is gone.

    Raises:
        Exception: any that is no failure of writing.
    """
    try:
        write()
    except OSError as error:
        return error.strerror or str(error)
    except SafetensorError as error:
        if "I/O error" not in str(error):
            raise
        return re.sub(r" \(os error \d+\)$", "", str(error).rpartition("I/O error: ")[2])
    except RuntimeError as error:
        # torch.save has no error of its own; the text is the assertion of its zip writer.
        if "inline_container.cc" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        return "a file could not be written whole"
    return None


def several_processes() -> bool:
    """Whether this is one of several processes that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def first_failure(own: str | None) -> str | None:
    """The failure of the first process that has one, the same in all of them. All must call it."""
    if not several_processes():
        return own
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, own)
    return next((f"process {rank}: {failure}" for rank, failure in enumerate(failures) if failure is not None), None)


def free_bytes(folder: Path) -> int | None:
    """Free space at a folder that may not exist yet; None where the file system does not say."""
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else None


def size_text(number: int | None) -> str:
    """A number of bytes for people, e.g. ``1.5 GB``."""
    if number is None:
        return "unknown"
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1000:.1f} kB"
