"""Files of routing: a safetensors file a batch, written whole before the batch's records are.

A record therefore never lacks its routing, and what a kill leaves is routing without a record: the item is answered
again, and of two routings of one item the later one counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from symphony_vlm.errors import InputError
from symphony_vlm.files import sync_file, sync_folder

__all__ = ["ShardReader", "ShardWriter", "load_whole", "merge_shards", "read_items", "shard_paths", "take_items"]

Arrays = Mapping[str, NDArray[Any]]
_LENGTHS = "lengths"
"""Name of the array ``[I]`` that says how many rows of the arrays by token belong to each item."""
_BY_TOKEN = ("_T", "_TLK", "_TLE")
"""Ends of names of arrays whose rows are tokens; those of the others are items."""


def shard_paths(folder: Path, stem: str) -> list[Path]:
    """The files of one cell: the merged one, then those of each process in the order of writing."""
    ours = re.compile(re.escape(stem) + r"\.(all|rank\d+\.\d+)\.safetensors")
    return sorted(path for path in folder.glob("*.safetensors") if ours.fullmatch(path.name))


def read_items(path: Path) -> list[str]:
    """Ids of the items in a file; none if it is torn.

    A power loss may tear a file; its items have no record either, or are answered again.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            items: list[str] = json.loads(file.metadata()["items"])
    except (SafetensorError, TypeError, KeyError, ValueError):
        return []
    return items


class ShardWriter:
    """Writes files of a cell, one a call.

    Args:
        folder: made if missing.
        stem: of the cell.
        rank: of the process; each writes files of its own.
    """

    def __init__(self, folder: Path, stem: str, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._prefix = f"{stem}.rank{rank}."
        self._folder = folder
        own = [path.name for path in shard_paths(folder, stem) if path.name.startswith(self._prefix)]
        numbers = [int(name.split(".")[-2]) for name in own]
        self._next = max(numbers, default=0) + 1

    def write(self, items: Sequence[str], arrays: Arrays) -> Path:
        """A new file with the arrays of these items."""
        path = self._folder / f"{self._prefix}{self._next:06d}.safetensors"
        _write(path, items, arrays)
        self._next += 1
        return path


class ShardReader:
    """Reads items from the files of a cell.

    Args:
        paths: the files; a later one's items replace those of an earlier one.
    """

    _KEPT = 4
    """Files held in memory. Cells ask for items in the same order, so that one after the other is needed."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._place: dict[str, tuple[Path, int]] = {}
        for path in paths:
            self._place.update({item: (path, row) for row, item in enumerate(read_items(path))})
        self._loaded: dict[Path, dict[str, NDArray[Any]]] = {}

    def __contains__(self, item: str) -> bool:
        return item in self._place

    def __len__(self) -> int:
        return len(self._place)

    @property
    def items(self) -> list[str]:
        """Ids of all items."""
        return list(self._place)

    def read(self, items: Sequence[str]) -> dict[str, NDArray[Any]]:
        """The arrays of some items, one item after the other, in this order.

        Args:
            items: at least one; each must be there.
        """
        by_path: dict[Path, list[int]] = {}
        for position, item in enumerate(items):
            by_path.setdefault(self._place[item][0], []).append(position)
        parts = []
        for path, positions in by_path.items():
            parts.append(take_items(self._load(path), [self._place[items[position]][1] for position in positions]))
        whole = parts[0] if len(parts) == 1 else {n: np.concatenate([part[n] for part in parts]) for n in parts[0]}
        order = np.argsort([position for positions in by_path.values() for position in positions])
        return whole if len(parts) == 1 else take_items(whole, order.tolist())

    def _load(self, path: Path) -> dict[str, NDArray[Any]]:
        if path not in self._loaded:
            while len(self._loaded) >= self._KEPT:
                del self._loaded[next(iter(self._loaded))]
            try:
                self._loaded[path] = load_file(path)
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"cannot be read ({error})", where=str(path), remedy="Remove it and run the evaluation again."
                ) from error
        return self._loaded[path]


def take_items(arrays: Arrays, items: Sequence[int]) -> dict[str, NDArray[Any]]:
    """The rows of some items, in that order; of arrays by token their tokens."""
    rows = np.asarray(items, dtype=np.int64)
    tokens = rows
    if _LENGTHS in arrays:
        lengths = arrays[_LENGTHS]
        starts = np.cumsum(lengths) - lengths
        # Within an item the positions count up: all positions, minus where the item begins among those taken.
        taken = lengths[rows]
        tokens = np.arange(taken.sum()) + np.repeat(starts[rows] - (np.cumsum(taken) - taken), taken)
    return {name: array[tokens if name.endswith(_BY_TOKEN) else rows] for name, array in arrays.items()}


def merge_shards(folder: Path, stem: str, items: Sequence[str]) -> Path | None:
    """Makes one file of a cell's with these items in this order; None if it has none of them.

    No process may be writing.
    """
    sources = shard_paths(folder, stem)
    reader = ShardReader(sources)
    present = [item for item in items if item in reader]
    if not present:
        return None
    whole = folder / f"{stem}.all.safetensors"
    if sources == [whole] and reader.items == present:
        return whole
    _write(whole, present, reader.read(present))
    for source in sources:
        if source != whole:
            source.unlink()
    return whole


def load_whole(folder: Path, stem: str) -> tuple[list[str], dict[str, NDArray[Any]]]:
    """Items and arrays of a cell that `merge_shards` has made one file of; nothing if there is none."""
    path = folder / f"{stem}.all.safetensors"
    if not path.is_file():
        return [], {}
    return read_items(path), load_file(path)


def _write(path: Path, items: Sequence[str], arrays: Arrays) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        # One entry: safetensors writes several in an order that changes from file to file.
        save_file(contiguous, temporary, metadata={"items": json.dumps(list(items))})
        sync_file(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # half a file on a full disk
        raise
    sync_folder(path.parent)
