"""A recipe that is another one with differences: ``base: NAME`` and what differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from symphony_vlm.config.prepared import put_prepared_data
from symphony_vlm.config.reading import read_mapping
from symphony_vlm.errors import InputError
from symphony_vlm.text import nearest

__all__ = ["read_recipe"]


def read_recipe(path: Path, find: Callable[[str], Path]) -> dict[str, Any]:
    """The values of a recipe's file on top of those of its bases, prepared data filled in.

    Mappings are merged key by key, stages by their names; anything else replaces what the base has, ``data: NAME``
    too.

    Args:
        path: the recipe's file.
        find: the file behind a recipe's name or a path; a path in ``base`` is relative to the file it stands in.

    Raises:
        InputError: a base does not exist or comes back to itself, a stage is none of the base's, or the recipe has no
            name of its own.
    """
    return _read(path, find, ())


def _read(path: Path, find: Callable[[str], Path], above: tuple[Path, ...]) -> dict[str, Any]:
    values = read_mapping(path, "a recipe is a mapping with model, data and stages, or with base and what differs")
    if "base" not in values:
        put_prepared_data(values)
        return values
    base = values.pop("base")
    where = f"{path}: base"
    if not isinstance(base, str):
        raise InputError(f"{base!r} is no recipe's name", where=where, remedy="Give one name or YAML file.")
    beside = path.parent / base
    found = find(str(beside) if beside.suffix in (".yaml", ".yml") and beside.is_file() else base).resolve()
    chain = (*above, path.resolve())
    if found in chain:
        names = " -> ".join(step.stem for step in (*chain[chain.index(found) :], found))
        raise InputError(f"{names} goes round in a circle", where=where, remedy="Take the base out of one of them.")
    if "name" not in values:
        raise InputError("a recipe with a base needs a name of its own", where=str(path), remedy="Add name: NAME.")
    below = _read(found, find, chain)
    merged = _merged(below, {key: value for key, value in values.items() if key != "stages"})
    if not isinstance(values.get("data", {}), dict):
        put_prepared_data(merged, below.get("data"))
    if "stages" in values:
        merged["stages"] = _merged_stages(below.get("stages"), values["stages"], str(path))
    return merged


def _merged(below: Any, value: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(value, dict):
        return value
    return below | {key: _merged(below.get(key), item) for key, item in value.items()}


def _merged_stages(below: Any, stages: Any, where: str) -> Any:
    """The base's stages in their order, with what the recipe says about some of them."""
    if not isinstance(below, list) or not isinstance(stages, list):
        return stages  # whatever it is, the schema has a word for it
    names = [_name_of(stage) for stage in below]
    changes: dict[str, Any] = {}
    for stage in stages:
        name = _name_of(stage)
        if name not in names:
            raise InputError(
                f"stage {name!r} is none of the base's: {', '.join(names)}{nearest(name, names)}",
                where=where,
                remedy="Give a recipe with other stages all of its stages, and no base.",
            )
        changes[name] = stage
    return [_merged(stage, changes.get(name, {})) for name, stage in zip(names, below, strict=True)]


def _name_of(stage: Any) -> str:
    return str(stage.get("name") if isinstance(stage, dict) else stage)
