"""The sources of a recipe: which a run uses, what logs call them, and which of their records are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import get_args

from symphony_vlm.config.recipe import DataRole, Recipe, SourceConfig
from symphony_vlm.data.scenes import generate_scenes
from symphony_vlm.data.skip_list import read_skip_lists
from symphony_vlm.errors import InputError

__all__ = ["NamedSource", "listed_records", "used_sources"]


@dataclass(frozen=True, kw_only=True)
class NamedSource:
    """A source with the name that reports, logs and counts use for it."""

    label: str
    """The file's name; more of its path where two files of a run have the same name."""
    source: SourceConfig
    image_folder: Path | None


def used_sources(recipe: Recipe, output: Path, report: Callable[[str], None]) -> dict[str, list[NamedSource]]:
    """The sources of every role that a stage uses.

    Args:
        recipe: its `data` and the stages' roles.
        output: the run's folder; scenes are drawn there if the recipe asks for them.
        report: gets a line about the scenes.

    Raises:
        InputError: a stage's data is not set.
    """
    sources = _by_role(recipe, output, report)
    for stage in recipe.stages:
        for role in stage.roles:
            if role not in sources:
                raise InputError(
                    f"stage {stage.name!r} trains on data.{role}, which is not set",
                    where=f"data.{role}",
                    remedy=f"Add data.{role}=FILE (LLaVA JSON, JSONL or parquet).",
                )
    used = sorted({role for stage in recipe.stages for role in stage.roles})
    labels = _labels([source for role in used for source in sources[role]])
    folder = recipe.data.image_folder
    return {
        role: [
            NamedSource(label=labels[source], source=source, image_folder=_folder(source.image_folder or folder))
            for source in sources[role]
        ]
        for role in used
    }


def listed_records(recipe: Recipe, sources: dict[str, list[NamedSource]]) -> dict[str, set[int]]:
    """The records that ``data.skip`` lists, by the source's label.

    Raises:
        InputError: a list cannot be used, see `data.skip_list`.
    """
    paths = {named.label: named.source.path for role in sources.values() for named in role}
    return read_skip_lists([Path(path).expanduser() for path in recipe.data.skip], paths)


def _by_role(recipe: Recipe, output: Path, report: Callable[[str], None]) -> dict[str, list[SourceConfig]]:
    data = recipe.data
    sources: dict[str, list[SourceConfig]] = {}
    if data.scenes is not None:
        drawn = generate_scenes(output / "scenes", seed=recipe.seed, **data.scenes.model_dump())
        report(f"scenes: {data.scenes.train} training and {data.scenes.test} test pictures in {output / 'scenes'}")
        folder = str(drawn.train_json.parent)
        sources["train"] = [SourceConfig(path=str(drawn.train_json), image_folder=folder)]
        captions = [SourceConfig(path=str(drawn.captions_train_json), image_folder=folder)]
        sources["captions"] = sources["prefinetune"] = captions
    return sources | {role: value for role in get_args(DataRole) if (value := getattr(data, role))}


def _labels(sources: list[SourceConfig]) -> dict[SourceConfig, str]:
    """The shortest name of each that no other has."""
    distinct = list(dict.fromkeys(sources))
    labels: dict[SourceConfig, str] = {}
    forms: list[Callable[[SourceConfig], str]] = [_short, _long]
    for name in forms:
        counts = Counter(name(source) for source in distinct)
        labels |= {source: name(source) for source in distinct if source not in labels and counts[name(source)] == 1}
    for source in distinct:
        # The same file with another image folder or weight.
        labels.setdefault(source, f"{_long(source)} ({distinct.index(source) + 1})")
    return labels


def _short(source: SourceConfig) -> str:
    on_disk = Path(source.path).expanduser().exists()
    return _with_split(PurePath(source.path).name if on_disk else source.path, source)


def _long(source: SourceConfig) -> str:
    return _with_split(source.path, source)


def _with_split(name: str, source: SourceConfig) -> str:
    return ":".join(part for part in (name, source.subset, source.split) if part)


def _folder(path: str | None) -> Path | None:
    return Path(path).expanduser() if path else None
