"""What a model's files tell about it, for its card. Nothing is loaded: only JSON, and the heads of weight files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Facts", "hub_id", "read_facts", "without_paths"]

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_ABSOLUTE = re.compile(r"(?<![\w.:/])(?:[A-Za-z]:[\\/]|~?/|\\\\)(?:[^\s|\\/]+[\\/])*([^\s|\\/]+)")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything a card says."""

    config: dict[str, Any]
    """config.json, or open_clip_config.json under ``open_clip``."""
    training: dict[str, Any] = field(default_factory=dict)
    """training.json."""
    num_parameters: int | None = None
    """In the folder's weight files."""
    base_models: tuple[str, ...] = ()
    """Hub ids of the pretrained models in it."""
    licence: str | None = None
    """As the card of the source model has it."""
    evaluation: tuple[dict[str, Any], ...] = ()
    """Of results.json, the entries of ``robustness.models`` that are this model's, one a task."""

    @property
    def kind(self) -> str:
        """``model_type``, or ``open_clip``."""
        return "open_clip" if "open_clip" in self.config else str(self.config.get("model_type", "unknown"))


def read_facts(folder: Path, *, source: Path | None = None, results: Path | None = None) -> Facts:
    """Reads a model's folder; see `writing.write_model_card` for the arguments."""
    config = _json(folder / "config.json")
    if not config and (clip := _json(folder / "open_clip_config.json")):
        config = {"open_clip": clip.get("model_cfg", {})}
    training = _json(folder / "training.json") or (_json(source / "training.json") if source else {})
    header = _card_header(source / "README.md") if source else {}
    parts = [part.get("name") for part in training.get("parts", [])]
    named = [*parts, hub_id(str(source)) if source else None]
    bases = [name for name in named if name] or _listed(header.get("base_model"))
    licence = header.get("license")
    return Facts(
        config=config,
        training=training,
        num_parameters=_count_parameters(folder),
        base_models=tuple(dict.fromkeys(bases)),
        licence=licence if isinstance(licence, str) else None,
        evaluation=_evaluation(results, folder) if results else (),
    )


def hub_id(name: str) -> str | None:
    """The hub id that a recipe's name, or a folder of the hub's cache, stands for; None for any other folder."""
    if found := _SNAPSHOT.search(name):
        return "/".join(found.groups())
    return name if _HUB_ID.match(name) and not Path(name).exists() else None


def without_paths(text: str) -> str:
    """A text in which every absolute path is cut down to its last part: a card may be read by anybody."""
    return _ABSOLUTE.sub(r"\1", text)


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _card_header(path: Path) -> Mapping[str, Any]:
    """The YAML at the top of a card; empty if there is none that can be read."""
    import yaml

    try:
        found = re.match(r"---\n(.*?)\n---\n", path.read_text(encoding="utf-8"), re.S)
        values = yaml.safe_load(found.group(1)) if found else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _listed(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, str)]


def _count_parameters(folder: Path) -> int | None:
    """Numbers in the weight files, from their heads."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118
                    size = 1
                    for side in file.get_slice(name).get_shape():
                        size *= side
                    total += size
        except (OSError, SafetensorError):
            return None
    return total or None


def _evaluation(results: Path, folder: Path) -> tuple[dict[str, Any], ...]:
    entries = _json(results).get("robustness", {}).get("models", [])
    return tuple(entry for entry in entries if Path(str(entry["model"])).resolve() == folder.resolve())
