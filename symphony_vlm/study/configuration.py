"""The schema of a study's YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from symphony_vlm.config.loading import apply_overrides
from symphony_vlm.config.reading import explain, read_mapping
from symphony_vlm.config.schema import Schema
from symphony_vlm.errors import InputError
from symphony_vlm.text import nearest

__all__ = ["Arm", "PerplexitySettings", "Study", "StudyText", "load_study"]

FOLDER = "studies"
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]


class Arm(Schema):
    """A recipe with differences, and what it is compared with."""

    settings: list[str] = Field(default_factory=list)
    """``a.b=c`` assignments to the recipe."""
    baseline: Name | None = None
    """Another arm; None: it is compared with none."""


class StudyText(Schema):
    """A text, cut into parts that share nothing."""

    path: str | None = None
    """UTF-8 text file, table or hub data set; usually given on the command line: ``texts.NAME.path=FILE``."""
    subset: str | None = None
    split: str | None = None
    by: Literal["article", "lines"] = "article"
    """Whether articles (``= Title =``) or stretches of 100 lines stay together."""
    test_lines: int | None = Field(default=None, gt=0)
    """So many lines of the test part at most."""


class PerplexitySettings(Schema):
    """How every arm is measured."""

    rates: list[Annotated[float, Field(gt=0, le=1)]] = Field(default=[0.015])
    """Of swapped words, besides the clean text."""
    context: int = Field(ge=2)
    stride: int = Field(ge=1)
    attack_seed: int = 0


def _as_arms(value: object) -> object:
    """An arm written as a list is one of settings alone."""
    if not isinstance(value, dict):
        return value
    return {name: {"settings": arm} if isinstance(arm, list) else arm for name, arm in value.items()}


class Study(Schema):
    """Every arm trains with every seed on every text."""

    name: Name
    description: str = ""
    recipe: str
    """Of language stages."""
    settings: list[str] = Field(default_factory=list)
    """Of all arms."""
    arms: Annotated[dict[Name, Arm], BeforeValidator(_as_arms), Field(min_length=1)]
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    texts: dict[Name, StudyText] = Field(min_length=1)
    perplexity: PerplexitySettings

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must differ, got {self.seeds}")
        if len(set(self.perplexity.rates)) != len(self.perplexity.rates):
            raise ValueError(f"perplexity.rates must differ, got {self.perplexity.rates}")
        for name, arm in self.arms.items():
            if arm.baseline is not None and (arm.baseline not in self.arms or arm.baseline == name):
                known = [other for other in self.arms if other != name]
                raise ValueError(
                    f"arm {name!r}: baseline {arm.baseline!r} is no other arm{nearest(arm.baseline, known)}"
                )
        return self


def load_study(name_or_path: str, overrides: Sequence[str] = ()) -> Study:
    """A validated study.

    Args:
        name_or_path: a YAML file, or the name of one in ``studies`` below the current folder.
        overrides: ``a.b=c`` assignments, e.g. ``texts.wikitext2.path=wiki.valid.tokens``, ``seeds=[0,1]``.

    Raises:
        InputError: no such file, an unknown key, a bad value, or a text without a path.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = Path(FOLDER) / f"{name_or_path}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in Path(FOLDER).glob("*.yaml"))
        raise InputError(
            f"no study of that name{nearest(name_or_path, known)}",
            where=str(path),
            remedy=f"Found in {FOLDER}/: {', '.join(known) or 'none'}; or give a path that ends in .yaml.",
        )
    values = read_mapping(path, "a study is a mapping with recipe, arms, seeds, texts and perplexity")
    apply_overrides(values, overrides)
    try:
        study = Study.model_validate(values)
    except ValidationError as error:
        raise explain(error, str(path), Study) from error
    for name, text in study.texts.items():
        if text.path is None:
            raise InputError(
                "the text has no path",
                where=f"texts.{name}",
                remedy=f"Add texts.{name}.path=FILE to the command.",
            )
    return study
