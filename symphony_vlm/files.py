"""Writing files and folders so that a reader never sees half of one, and a power loss takes none back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["replacing_folder", "sync_file", "sync_folder", "sync_tree", "write_json", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Writes the whole file or nothing: a temporary file, flushed to disk, then renamed over the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # half a file on a full disk
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync_file(path: Path) -> None:
    """Flushes to disk what this machine has written to a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flushes to disk which files a folder has: without it, a power loss can undo a rename."""
    if os.name != "posix":  # others cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync_file` and `sync_folder` of everything in a folder."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            sync_file(path)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A folder that does not exist yet, to be filled; it takes the place of ``folder`` when all is written.

    At every moment the old or the new contents lie complete under the folder's name or, between two renames, under
    ``.NAME.old``, which the next call puts back. An exception inside leaves the old contents.
    """
    temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    if old.exists():  # a kill between the renames, or while the old contents were removed
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        sync_tree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
