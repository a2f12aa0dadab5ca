"""Several processes that evaluate together: they share files and wait for each other, and no tensor goes between them.

``torchrun --nproc-per-node N -m eval.benchmark ...`` starts them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.training.launch import check_count, check_launch

__all__ = ["ALONE", "Processes", "join"]

_PATIENCE = timedelta(days=7)
"""How long a process waits for the slowest; one that dies is noticed at once, by the launcher."""
_REMEDY = "Start it with torchrun --nproc-per-node N -m eval.benchmark ..."


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Which process this is, of how many."""

    rank: int
    size: int
    barrier: Callable[[], None] = lambda: None
    """Returns when all have called it."""

    @property
    def first(self) -> bool:
        """Whether this is the one that merges and writes results."""
        return self.rank == 0

    def owns(self, item: EvaluationItem) -> bool:
        """Whether this process answers the item: all questions about a picture go to one, which encodes it once."""
        # The last part of a path, not all of it: in another folder the same process answers.
        name = (item.image_key or item.id).rpartition("/")[2]
        digest = hashlib.sha256(name.encode()).digest()
        return int.from_bytes(digest[:8], "big") % self.size == self.rank

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The first process runs the block while the others wait, then they do."""
        if not self.first:
            self.barrier()
        yield
        if self.first:
            self.barrier()


ALONE = Processes(rank=0, size=1)


def join() -> Processes:
    """Joins the processes of a launch; `ALONE` without one.

    Raises:
        InputError: A launcher has started several processes, but they are not one evaluation.
    """
    check_launch(remedy=_REMEDY)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        # Barriers alone: on a GPU too they need none of it.
        dist.init_process_group("gloo", timeout=_PATIENCE)
    if not dist.is_initialized():
        check_count(1, remedy=_REMEDY)
        return ALONE
    check_count(dist.get_world_size(), remedy=_REMEDY)
    return Processes(rank=dist.get_rank(), size=dist.get_world_size(), barrier=dist.barrier)
