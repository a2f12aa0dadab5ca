"""Bytes of a file by position, for indices that hold offsets instead of content.

Not a memory map: pages of one count as the process's memory, so that walking a file of ten gigabytes would look like
(and under a container's limit be) ten gigabytes; and a file cut short by another program would end the process.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any, BinaryIO

from symphony_vlm.errors import InputError

__all__ = ["FileSlices"]


class FileSlices:
    """Random access to a file that must not change while it is in use.

    Safe for several threads; a forked process and a process that got a pickled copy open the file for themselves.

    Args:
        path: The file, which must exist.

    Raises:
        InputError: The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"cannot be read: {error}", where=str(path)) from error
        self.size = status.st_size
        self._state = (status.st_size, status.st_mtime_ns)
        self._handle: tuple[int, BinaryIO] | None = None
        self._lock = threading.Lock()

    def read(self, start: int, end: int) -> bytes:
        """The bytes from ``start`` to before ``end``.

        Raises:
            InputError: The file is gone or has changed since it was indexed.
        """
        with self._lock:
            file = self._file()
            file.seek(start)
            data = file.read(end - start)
        if len(data) != end - start:
            raise self._changed()
        return data

    def close(self) -> None:
        """Give the open file back to the system; the next `read` opens it again."""
        with self._lock:
            if self._handle is not None and self._handle[0] == os.getpid():
                self._handle[1].close()
            self._handle = None

    def _file(self) -> BinaryIO:
        # The position of an open file is shared with forked processes, so each needs a file of its own.
        if self._handle is None or self._handle[0] != os.getpid():
            try:
                file = self.path.open("rb")
            except OSError as error:
                raise InputError(f"can no longer be read: {error}", where=str(self.path)) from error
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != self._state:
                file.close()
                raise self._changed()
            self._handle = (os.getpid(), file)
        return self._handle[1]

    def _changed(self) -> InputError:
        return InputError(
            "has changed since it was opened",
            where=str(self.path),
            remedy="Start again, and leave data files alone while they are in use.",
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
