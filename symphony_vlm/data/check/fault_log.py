"""Faults on disk: a file of a million broken records would not fit into memory as objects."""

from __future__ import annotations

import heapq
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import IO

from symphony_vlm.data.check.faults import Fault

__all__ = ["FaultLog"]

_EXAMPLES = 20


class FaultLog:
    """Every fault in order, as JSON lines in a temporary file; counts and the first few of each kind in memory."""

    def __init__(self) -> None:
        self.by_kind: Counter[str] = Counter()
        self.examples: dict[str, list[Fault]] = {}
        """The first faults of each kind."""
        self.n_faulty_records = 0
        self._last: tuple[str, int] | None = None
        self._file = _temporary()

    def __len__(self) -> int:
        return self.by_kind.total()

    def __iter__(self) -> Iterator[Fault]:
        yield from _read(self._file)

    def add(self, fault: Fault) -> None:
        """Appends a fault; those of one record must follow each other."""
        self.by_kind[fault.kind] += 1
        examples = self.examples.setdefault(fault.kind, [])
        if len(examples) < _EXAMPLES:
            examples.append(fault)
        place = (fault.file, fault.index)
        self.n_faulty_records += place != self._last
        self._last = place
        self._file.write(json.dumps(fault.to_dict()) + "\n")

    def add_merged(self, first: FaultLog, second: Iterable[Fault]) -> None:
        """Appends two series of one file's faults, each ascending by record, in the order of the records."""
        for fault in heapq.merge(first, second, key=lambda fault: fault.index):
            self.add(fault)

    def lines(self) -> Iterator[str]:
        """The faults as JSON, one by one."""
        self._file.seek(0)
        for line in self._file:
            yield line.rstrip("\n")

    def close(self) -> None:
        """Deletes the temporary file."""
        self._file.close()


def _temporary() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8")


def _read(file: IO[str]) -> Iterator[Fault]:
    file.seek(0)
    for line in file:
        yield Fault(**json.loads(line))
