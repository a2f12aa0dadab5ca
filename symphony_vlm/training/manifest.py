"""The list of a checkpoint's files, by which damage is found before a restart trusts it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from symphony_vlm.files import write_json

__all__ = ["find_damage", "read_manifest", "write_manifest"]

MANIFEST = "manifest.json"
_EDGE = 1 << 20
"""Bytes at the beginning and at the end of a file that its checksum covers. Files cut short, zeroed or swapped differ
there, and a checkpoint of any size is checked in a moment."""


def write_manifest(folder: Path, *, processes: int) -> None:
    """Lists the files with their sizes and checksums; it comes last, when all of them are written.

    Args:
        folder: a checkpoint.
        processes: how many processes have written it.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): _facts(path) for path in paths}
    write_json(folder / MANIFEST, {"processes": processes, "bytes": _total(files), "files": files})


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` has written.

    Raises:
        ValueError: it is no such file.
    """
    found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict) or "processes" not in found:
        raise ValueError(f"{MANIFEST} is no list of files")
    return found


def find_damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        for name, expected in read_manifest(folder)["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            found = _facts(path)
            if found["bytes"] != expected["bytes"]:
                return f"{name} has {found['bytes']} bytes and not {expected['bytes']}"
            if found["sha256"] != expected["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{error.filename or MANIFEST}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    return None


def _facts(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_EDGE))
        if size > _EDGE:
            file.seek(max(_EDGE, size - _EDGE), os.SEEK_SET)
            digest.update(file.read(_EDGE))
    return {"bytes": size, "sha256": digest.hexdigest()}


def _total(files: dict[str, dict[str, Any]]) -> int:
    return sum(facts["bytes"] for facts in files.values())
