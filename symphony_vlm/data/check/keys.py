"""Which records are there twice: 16 bytes are kept for each, and compared once all are known."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator

import numpy as np

from symphony_vlm.data.images import image_key
from symphony_vlm.data.sample import ImagePart, Sample

__all__ = ["KeyColumn", "content_key", "id_key"]

KEY_BYTES = 16


class KeyColumn:
    """A growing column of 16-byte keys with the number of the record (or picture) that each belongs to.

    24 bytes an entry, where a Python set of strings would take some 200.
    """

    def __init__(self) -> None:
        self._halves = array("Q")
        self._owners = array("q")

    def __len__(self) -> int:
        return len(self._owners)

    def add(self, key: bytes, owner: int) -> None:
        """Appends a key of 16 bytes; owners must ascend."""
        self._halves.frombytes(key)
        self._owners.append(owner)

    def repeats(self) -> tuple[np.ndarray, np.ndarray]:
        """(later, first): the owners whose key occurred before, ascending, and who had it first; int64 ``[N]``."""
        halves = np.frombuffer(self._halves, dtype=np.uint64).reshape(-1, 2)
        owners = np.frombuffer(self._owners, dtype=np.int64)
        order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: within a key the owners still ascend
        same = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
        starts = np.flatnonzero(np.concatenate(([True], ~same))) if len(order) else np.empty(0, dtype=np.int64)
        first = order[starts[np.cumsum(np.concatenate(([True], ~same))) - 1]] if len(order) else order
        later = np.flatnonzero(np.concatenate(([False], same))) if len(order) else order
        by_record = np.argsort(owners[order[later]], kind="stable")
        chosen = later[by_record]
        return owners[order[chosen]], owners[first[chosen]]

    def groups(self, limit: int) -> Iterator[list[int]]:
        """The first ``limit`` sets of owners that share a key."""
        later, first = self.repeats()
        for owner in np.unique(first)[:limit]:
            yield [int(owner), *map(int, later[first == owner])]


def id_key(sample: Sample) -> bytes | None:
    """Key of the record's id, or None if the file gives it none (its index stands in then)."""
    if f"(id {sample.id!r})" not in sample.origin:
        return None
    return _digest(sample.id)


def content_key(sample: Sample) -> bytes:
    """Key of what a model would learn from the record: its pictures and turns.

    Of a record without an id the other fields count too: one of them may be what tells it from the next.
    """
    turns = [[m.role, [p.index if isinstance(p, ImagePart) else p.text for p in m.parts]] for m in sample.messages]
    content: list[object] = [[image_key(ref) for ref in sample.images], turns]
    if id_key(sample) is None:
        content.append(sample.meta)
    return _digest(json.dumps(content, default=repr, sort_keys=True))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()
