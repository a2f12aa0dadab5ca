"""Where a run stands, on disk: which stages are done, and where a restart continues."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from symphony_vlm.config.recipe import Recipe
from symphony_vlm.errors import InputError
from symphony_vlm.files import write_json, write_text

__all__ = ["RunState"]


class RunState:
    """``RUN/state.json``, replaced atomically at every change.

    Args:
        folder: the run's.
        recipe: must be the one that the folder was begun with.
        read_only: for all processes but the first; changes are kept in memory.

    Raises:
        InputError: the folder belongs to another recipe.
    """

    def __init__(self, folder: Path, recipe: Recipe, *, read_only: bool = False) -> None:
        self._read_only = read_only
        self._path = folder / "state.json"
        self._recipe_path = folder / "recipe.resolved.yaml"
        values = json.loads(recipe.model_dump_json())
        resolved = yaml.safe_dump(values, sort_keys=False)
        digest = hashlib.sha256(resolved.encode()).hexdigest()
        self.values: dict[str, Any] = {"recipe": recipe.name, "recipe_sha256": digest, "stages": {}}
        if self._path.is_file() and self._continue(folder, values, digest):
            return
        if not read_only:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(self._recipe_path, resolved)
            self._write()

    def _continue(self, folder: Path, values: dict[str, Any], digest: str) -> bool:
        """Takes over the state found; False if no stage had begun, e.g. because of a wrong path in the recipe."""
        found = json.loads(self._path.read_text())
        if found["recipe_sha256"] != digest:
            if not found["stages"]:
                shutil.rmtree(folder / "tokenizer", ignore_errors=True)
                return False
            old = yaml.safe_load(self._recipe_path.read_text())
            changes = ", ".join(_differences(old, values)[:3])
            raise InputError(
                f"the folder holds a run of another recipe; it differs in {changes}",
                where=str(folder),
                remedy="Give another --output, or the same settings to continue.",
            )
        self.values = found
        return True

    def is_done(self, stage: str) -> bool:
        """Whether the stage has finished and its model is saved."""
        return self.values["stages"].get(stage, {}).get("status") == "done"

    def set(self, stage: str, **values: Any) -> None:
        """Records facts about a stage, e.g. ``status="running", step=120``."""
        self.values["stages"].setdefault(stage, {}).update(values)
        if not self._read_only:
            self._write()

    def get(self, stage: str) -> dict[str, Any]:
        """What is known about a stage."""
        known: dict[str, Any] = self.values["stages"].get(stage, {})
        return known

    def check_data(self, fingerprints: dict[str, str]) -> None:
        """Records what the data is, or makes sure that it is still what the run was begun with.

        Args:
            fingerprints: by file, see `run_data.RunData`.

        Raises:
            InputError: a stage has begun, and a file is another than then.
        """
        begun = self.values.get("data")
        if begun is not None and self.values["stages"]:
            changed = [name for name in {**begun, **fingerprints} if begun.get(name) != fingerprints.get(name)]
            if changed:
                raise InputError(
                    f"{', '.join(changed)} changed since the run began; continued, it would train on a mixture of both",
                    where=str(self._path.parent),
                    remedy="Put the file back as it was, or give another --output to begin anew.",
                )
        self.values["data"] = fingerprints
        if not self._read_only:
            self._write()

    def _write(self) -> None:
        write_json(self._path, self.values)


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in _differences(a, b, f"{path}.{i}")]
    return [] if old == new else [f"{path} ({old!r} before, {new!r} now)"]
