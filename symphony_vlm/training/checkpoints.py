"""Checkpoints of a stage: each is there as a whole or not at all, however the run ends.

All processes write into a folder under ``.saving``. When all are done it is flushed to disk, gets a list of its files
(`manifest`) and its name, ``checkpoint-STEP``, by one rename. What a kill leaves under ``.saving`` is removed by the
next start.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainerState, TrainingArguments

from symphony_vlm.errors import SavingError
from symphony_vlm.files import sync_folder, sync_tree
from symphony_vlm.training.manifest import find_damage, read_manifest, write_manifest
from symphony_vlm.training.writing import attempt, first_failure, free_bytes, several_processes, size_text

__all__ = ["Checkpoints", "checkpoint_folder", "step_of"]

STAGING = ".saving"


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the checkpoint lies that is being saved, for callbacks that add files to it in ``on_save``.

    All that any process writes there until its last ``on_save`` returns is part of the checkpoint.
    """
    return Path(args.output_dir) / STAGING / f"checkpoint-{state.global_step}"


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


class Checkpoints:
    """The checkpoints of a stage.

    Args:
        folder: the stage's.
        keep: how many stay.
        report: gets a line for whatever is not as it should be.
        saved: called with the step of a checkpoint that is in its place.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        report: Callable[[str], None],
        saved: Callable[[int], None],
    ) -> None:
        self.folder = folder
        self.staging = folder / STAGING
        """Where `save` has its files written, under the name of the checkpoint."""
        self._keep = keep
        self._report = report
        self._saved = saved

    def save(self, step: int, write: Callable[[], object], *, size: int, collective: bool = False) -> bool:
        """Saves a checkpoint, then removes those that are no longer to be kept. All processes call it.

        A checkpoint that cannot be written (the disk is full) is reported and left out; the earlier ones stay.

        Args:
            step: of the optimizer.
            write: puts the files into ``staging / f"checkpoint-{step}"``.
            size: what it will take at least, in bytes, for want of an earlier checkpoint.
            collective: whether the processes wait for each other inside `write`, as under DeepSpeed and FSDP. Then one
                that fails there cannot tell the others, and has to end the run.

        Returns:
            whether it was saved.

        Raises:
            SavingError: it was not, and `collective`.
        """
        processes = PartialState()
        size = max((self._size(path) for path in self._complete()), default=size)
        tasks: list[tuple[Callable[[], object], bool]] = [
            (partial(self._make_room, size), processes.is_main_process),
            (write, True),
            # A machine can flush only what it has written itself.
            (partial(sync_tree, self.staging), processes.is_local_main_process),
            (partial(self._put_in_place, step, processes.num_processes), processes.is_main_process),
        ]
        for task, is_ours in tasks:
            own = attempt(task) if is_ours else None
            if own and collective and task is write:
                raise SavingError(self._failed(step, own, size, then="Run the same command again to continue."))
            failure = first_failure(own)
            if failure:
                if processes.is_main_process:
                    shutil.rmtree(self.staging, ignore_errors=True)
                then = "Training goes on; the next save point tries again."
                self._report(self._failed(step, failure, size, then=then))
                return False
        for follow_up in (partial(self._saved, step), partial(self._remove_old, processes.is_main_process)):
            failure = attempt(follow_up)
            if failure:
                self._report(f"{self.folder}: {failure}, after saving checkpoint-{step}")
        return True

    def last(self) -> Path | None:
        """The newest checkpoint that can be used, the same in all processes, which all call it.

        What is left of one that was being saved is removed. One whose files are no longer what they were is reported
        and renamed to ``damaged-checkpoint-STEP``.
        """
        found = [self._newest()] if PartialState().is_main_process else [None]
        if several_processes():
            dist.broadcast_object_list(found, src=0)
        return found[0]

    def _newest(self) -> Path | None:
        shutil.rmtree(self.staging, ignore_errors=True)
        for checkpoint in reversed(list(self._complete())):
            damage = find_damage(checkpoint)
            if damage is None:
                self._compare_processes(checkpoint)
                return checkpoint
            aside = self._unused(f"damaged-{checkpoint.name}")
            checkpoint.rename(aside)
            self._report(f"{checkpoint}: damaged ({damage}); renamed to {aside.name}, the one before it is used")
        return None

    def _compare_processes(self, checkpoint: Path) -> None:
        before, now = read_manifest(checkpoint)["processes"], PartialState().num_processes
        if before != now:
            self._report(
                f"{checkpoint}: written by {before} processes, continued by {now}; random states and the order of the "
                "samples will be others than without the interruption"
            )

    def _unused(self, name: str) -> Path:
        path, number = self.folder / name, 1
        while path.exists():
            number += 1
            path = self.folder / f"{name}.{number}"
        return path

    def _complete(self) -> Iterator[Path]:
        """All checkpoints by step; whatever has this name is complete."""
        paths = [path for path in self.folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
        return iter(sorted(paths, key=step_of))

    def _size(self, checkpoint: Path) -> int:
        return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())

    def _make_room(self, size: int) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)
        free = free_bytes(self.folder)
        if free is not None and free < size:
            raise OSError("not enough space")
        self.staging.mkdir(parents=True)

    def _put_in_place(self, step: int, num_processes: int) -> None:
        finished = self.staging / f"checkpoint-{step}"
        write_manifest(finished, processes=num_processes)
        finished.rename(self.folder / finished.name)
        sync_folder(self.folder)

    def _remove_old(self, is_main: bool) -> None:
        if not is_main:
            return
        for checkpoint in list(self._complete())[: -self._keep]:
            # A kill while it is removed must not leave half of it under its name.
            half = self.staging / checkpoint.name
            checkpoint.rename(half)
            shutil.rmtree(half)
        shutil.rmtree(self.staging)

    def _failed(self, step: int, failure: str, size: int, *, then: str) -> str:
        last = max(map(step_of, self._complete()), default=0)
        stays = f"checkpoint-{last} stays" if last else "there is none before it"
        return (
            f"{self.folder}: checkpoint-{step} could not be saved ({failure}): it takes about {size_text(size)}, and "
            f"{size_text(free_bytes(self.folder))} are free; {stays}. {then} Free some space on that disk."
        )
