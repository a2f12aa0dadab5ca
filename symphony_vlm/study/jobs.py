"""The jobs of a study: commands that run in a folder of their own, and when they are done."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from symphony_vlm.files import write_json, write_text

__all__ = ["COMMAND", "Job"]

COMMAND = (sys.executable, "-m", "symphony_vlm.cli")
"""How a job calls the command line."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Commands one after the other; other commands, or others before them, and the folder is begun anew."""

    name: str
    """For messages."""
    folder: Path
    commands: Mapping[str, tuple[str, ...]]
    """By what they do."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Text files that the commands read, by their names in the folder."""
    needs: tuple[Job, ...] = ()
    """What must be done before."""

    def is_done(self) -> bool:
        """Whether exactly this has run to its end."""
        return _read(self.folder / "cell.json") == self.record()

    def begin(self) -> None:
        """Removes what another job left, which cannot go on with these settings, and writes the files."""
        begun = self.folder / "begun.json"
        if self.folder.exists() and _read(begun) != self.record():
            shutil.rmtree(self.folder)
        write_json(begun, self.record())
        for name, text in self.files.items():
            write_text(self.folder / name, text)

    def finish(self) -> None:
        """Notes that it is done, and removes the checkpoints, which nothing needs any more."""
        for checkpoint in (self.folder / "run").glob("*/checkpoint-*"):
            shutil.rmtree(checkpoint)
        write_json(self.folder / "cell.json", self.record())

    def record(self) -> dict[str, object]:
        """What it is."""
        # Not the interpreter, which may lie elsewhere next time.
        record: dict[str, object] = {name: list(command[1:]) for name, command in self.commands.items()}
        if self.files:
            record["files"] = dict(self.files)
        if self.needs:
            record["after"] = {need.name: need.digest() for need in self.needs}
        return record

    def digest(self) -> str:
        """Hash of the record, and so of everything before it."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
