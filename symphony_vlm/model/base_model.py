"""Which model an adapter belongs to: where it is, and whether it is still the one that the adapter was trained on."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symphony_vlm.errors import InputError
from symphony_vlm.model.loading import local_folder

__all__ = ["BaseModel", "find_base", "fingerprint"]

_BLOCK = 2**16
_BLOCKS = 64


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The model under an adapter: a folder, or a hub name."""

    name: str
    """Absolute path of the folder, or the hub name."""
    fingerprint: str
    """See `fingerprint`."""

    @classmethod
    def at(cls, name: str | Path) -> BaseModel:
        """The model of a folder or a hub name.

        Raises:
            InputError: there is none.
        """
        folder = local_folder(name)
        found = str(folder.resolve()) if Path(name).is_dir() else str(name)
        return cls(name=found, fingerprint=fingerprint(folder))

    def record(self, folder: Path) -> dict[str, Any]:
        """What an adapter in a folder notes, to be read by `find_base`."""
        values = {"name": self.name, "fingerprint": self.fingerprint}
        if Path(self.name).is_dir():
            # A run that is moved as a whole keeps its relative paths, an adapter that is moved alone the absolute one.
            values["relative"] = os.path.relpath(self.name, folder.resolve())
        return values


def find_base(record: dict[str, Any], folder: Path) -> Path:
    """The folder of the model that an adapter in `folder` belongs to.

    Raises:
        InputError: it is not where it was, or is another model than it was.
    """
    tried: list[Path] = [folder.resolve() / record["relative"]] if "relative" in record else []
    tried.append(Path(record["name"]))
    found = next((path for path in tried if (path / "config.json").is_file()), None)
    if found is None and "relative" not in record:
        found = local_folder(record["name"])
    if found is None:
        raise InputError(
            f"this folder has adapters only, and their model is neither at {' nor at '.join(map(str, tried))}",
            where=str(folder),
            remedy="Put it back there, or write the name of its folder to adapter.base.name in config.json.",
        )
    if fingerprint(found) != record["fingerprint"]:
        raise InputError(
            f"the adapters were trained on another model than is now at {found}",
            where=str(folder),
            remedy="Put the model back that the adapters were trained on.",
        )
    return found.resolve()


def fingerprint(folder: Path) -> str:
    """sha256 of the sizes of a model's weight files and of blocks spread over them.

    Not of all bytes: that would take as long as opening the model does. Another training run changes every block.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "big"))
        with path.open("rb") as file:
            for start in sorted({size * i // _BLOCKS for i in range(_BLOCKS)} | {max(0, size - _BLOCK)}):
                file.seek(start)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()
