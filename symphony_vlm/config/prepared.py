"""Prepared data by name: ``configs/data/NAME.yaml`` says where the files are, what they hold, and under what terms."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import ConfigDict, Field, ValidationError, model_validator

from symphony_vlm.config.reading import config_folder, explain, read_mapping
from symphony_vlm.config.recipe import DataConfig, DataRole, SourceConfig
from symphony_vlm.config.schema import Schema
from symphony_vlm.errors import InputError
from symphony_vlm.text import nearest

__all__ = ["PreparedData", "list_prepared", "load_prepared", "put_prepared_data"]

_ROLES = get_args(DataRole)
_WHERE = (*_ROLES, "image_folder", "scenes")
"""What prepared data replaces in a recipe; its other data settings stay."""


class PreparedData(Schema):
    """A public data set: training data with its `data`, or an evaluation set with its `evaluation`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    description: str
    purpose: Literal["training", "evaluation"]
    homepage: str = Field(pattern=r"^https://")
    data: DataConfig | None = None
    """Where the files are expected, for ``data: NAME`` in a recipe."""
    evaluation: SourceConfig | None = None
    """The hub data set of an evaluation set."""
    records: dict[str, int | None]
    """Expected records by file or split; None: no public figure is known."""
    images: str
    """The layout of the image folder, or that images are inside the records."""
    size: str
    """Bytes to download, as published, or ``unknown``."""
    licence: str
    """As published, or ``unknown``."""
    sources: list[str] = Field(min_length=1)
    """Where these figures and terms are published."""

    @model_validator(mode="after")
    def _consistent(self) -> PreparedData:
        if (self.data is None) == (self.purpose == "training"):
            raise ValueError("'data' belongs to training data, and training data needs it")
        if (self.evaluation is None) == (self.purpose == "evaluation"):
            raise ValueError("'evaluation' belongs to evaluation sets, and they need it")
        return self


def list_prepared() -> list[str]:
    """Names of the prepared data."""
    return sorted(path.stem for path in (config_folder() / "data").glob("*.yaml"))


def load_prepared(name: str) -> PreparedData:
    """Prepared data by its name.

    Raises:
        InputError: no such name (the nearest is named), or the file is not valid.
    """
    path = config_folder() / "data" / f"{name}.yaml"
    names = list_prepared()
    if name not in names:
        raise InputError(
            f"no prepared data of that name{nearest(name, names)}",
            where=f"data {name!r}",
            remedy=f"Prepared: {', '.join(names)}; or give files, e.g. data.train=FILE.",
        )
    try:
        return PreparedData.model_validate(read_mapping(path, "prepared data is a mapping"))
    except ValidationError as error:
        raise explain(error, str(path), PreparedData) from error


def put_prepared_data(values: dict[str, Any], before: Any = None) -> None:
    """Replaces ``data: NAME`` or ``data: [NAME, NAME]`` in a recipe's values by the settings behind the names.

    Args:
        values: the recipe; changed in place.
        before: what `data` was before the name took its place: its settings that do not say where data is are kept.

    Raises:
        InputError: an unknown name, an evaluation set, or two sets for the same role.
    """
    names = values.get("data")
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, list):
        return
    kept = {key: value for key, value in before.items() if key not in _WHERE} if isinstance(before, dict) else {}
    found = [_fragment(str(name), alone=len(names) == 1) for name in names]
    for number, fragment in enumerate(found):
        for role in _ROLES:
            if role in fragment and any(role in other for other in found[:number]):
                raise InputError(
                    f"more than one of {', '.join(map(str, names))} gives data.{role}",
                    where="data",
                    remedy=f"Take one, and list the other's file under data.{role} with a weight.",
                )
        kept |= fragment
    values["data"] = kept


def _fragment(name: str, *, alone: bool) -> dict[str, Any]:
    prepared = load_prepared(name)
    if prepared.data is None:
        raise InputError(
            f"{name} is an evaluation set; a model trained on it could not be evaluated with it",
            where="data",
            remedy="Give training data; data.train=FILE takes any file you name.",
        )
    fragment = prepared.data.model_dump(exclude_unset=True)
    # One set leaves its image folder where an override reaches it; several sets have one each.
    if not alone and (folder := fragment.pop("image_folder", None)) is not None:
        for role in _ROLES:
            for source in fragment.get(role, []):
                source.setdefault("image_folder", folder)
    return fragment
