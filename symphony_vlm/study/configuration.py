"""The schema of a study's YAML file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from symphony_vlm.config.loading import apply_overrides
from symphony_vlm.config.reading import explain, read_mapping
from symphony_vlm.config.schema import Schema
from symphony_vlm.errors import InputError
from symphony_vlm.text import nearest

__all__ = [
    "Arm",
    "Choice",
    "EvaluationSettings",
    "PerplexitySettings",
    "Select",
    "Study",
    "StudyPictures",
    "StudyScenes",
    "StudyText",
    "load_study",
]

FOLDER = "studies"
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]
Severity = Annotated[int, Field(ge=1, le=5)]


class Arm(Schema):
    """A recipe with differences, and what it is compared with."""

    settings: list[str] = Field(default_factory=list)
    """``a.b=c`` assignments to the recipe."""
    baseline: Name | None = None
    """Another arm; None: it is compared with none."""
    controls: list[Name] = Field(default_factory=list)
    """Negative controls that it is compared with too, in a table of its own: does it matter whom the graph connects?"""
    control: bool = False
    """Whether it is a negative control: nothing is claimed of it, and a gain that it shares is no merit of the graph's
    counts."""


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
    """How every arm of a study of language models is measured."""

    rates: list[Annotated[float, Field(gt=0, le=1)]] = Field(default=[0.015])
    """Of swapped words, besides the clean text."""
    context: int = Field(ge=2)
    stride: int = Field(ge=1)
    attack_seed: int = 0


class StudyScenes(Schema):
    """Built-in scenes (``symphony-vlm data scenes``)."""

    train: int = Field(gt=0)
    test: int = Field(gt=0)
    image_size: int = Field(default=64, ge=32)


class StudyPictures(Schema):
    """Pictures with questions, the same for every seed: drawn scenes, or files."""

    scenes: StudyScenes | None = None
    """Drawn once; those to choose settings by are as many as those to test on, drawn with another seed."""
    train: str | None = None
    """Usually given on the command line: ``pictures.train=FILE``."""
    test: str | None = None
    development: str | None = None
    """What settings are chosen by, if the study chooses any."""
    image_folder: str | None = None
    """Base of the files' image paths; None: the folder of each file."""
    task: str = "short_answer"

    @model_validator(mode="after")
    def _one_source(self) -> StudyPictures:
        if self.scenes is not None and (self.train or self.test or self.development or self.image_folder):
            raise ValueError("'scenes' are drawn; leave out 'train', 'test', 'development' and 'image_folder'")
        return self


class EvaluationSettings(Schema):
    """How every arm of a study with pictures is measured."""

    corruptions: list[str] = Field(min_length=1)
    """Names, ``common`` (the 15 of ImageNet-C) or ``all`` (19); the mean is over the common ones."""
    severities: list[Severity] = Field(default=[1, 2, 3, 4, 5], min_length=1)
    limit: int | None = Field(default=None, gt=0)
    """Questions about the clean pictures."""
    corrupted_limit: int | None = Field(default=None, gt=0)
    """Questions of each corrupted cell, about the first of the clean pictures."""
    batch_size: int = Field(default=64, gt=0)
    max_new_tokens: int = Field(default=16, gt=0)
    seed: int = 0
    """Of the corruptions and the choice of pictures, the same for every arm and seed of training."""
    routing: bool = True
    """Whether the routers are recorded, and compared between clean and corrupted pictures."""


class Choice(Schema):
    """One of several arms, by the development data; the test data is then asked about that one."""

    among: list[Name] = Field(min_length=1)
    baseline: Name | None = None
    """An arm or another choice."""


class Select(Schema):
    """Settings are chosen first and tested once."""

    by: str = "clean"
    """The condition whose mean over seeds decides."""
    choices: dict[Name, Choice] = Field(min_length=1)


def _as_arms(value: object) -> object:
    """An arm written as a list is one of settings alone."""
    if not isinstance(value, dict):
        return value
    return {name: {"settings": arm} if isinstance(arm, list) else arm for name, arm in value.items()}


class Study(Schema):
    """Every arm trains with every seed: language models on every text, or vision-language models on the pictures."""

    name: Name
    description: str = ""
    recipe: str
    """Of language stages, or with a stage that upcycles; what stands before that is trained once a seed."""
    settings: list[str] = Field(default_factory=list)
    """Of all arms."""
    arms: Annotated[dict[Name, Arm], BeforeValidator(_as_arms), Field(min_length=1)]
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    texts: dict[Name, StudyText] = Field(default_factory=dict)
    perplexity: PerplexitySettings | None = None
    pictures: StudyPictures | None = None
    evaluation: EvaluationSettings | None = None
    select: Select | None = None

    @property
    def is_language(self) -> bool:
        """Whether its arms are language models."""
        return self.pictures is None

    @model_validator(mode="after")
    def _one_kind(self) -> Study:
        language, pictures = (self.texts or None, self.perplexity), (self.pictures, self.evaluation)
        given = [all(kind) for kind in (language, pictures)]
        if sum(given) != 1 or any(language if given[1] else pictures):
            raise ValueError("a study has 'texts' and 'perplexity', or 'pictures' and 'evaluation'")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        rates = self.perplexity.rates if self.perplexity else []
        for name, values in (("seeds", self.seeds), ("perplexity.rates", rates)):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} must differ, got {values}")
        for name, arm in self.arms.items():
            if arm.baseline is not None and (arm.baseline not in self.arms or arm.baseline == name):
                known = [other for other in self.arms if other != name]
                raise ValueError(
                    f"arm {name!r}: baseline {arm.baseline!r} is no other arm{nearest(arm.baseline, known)}"
                )
            known = [other for other, found in self.arms.items() if found.control and other != name]
            for control in arm.controls:
                if control not in known:
                    raise ValueError(
                        f"arm {name!r}: controls: {control!r} is no other arm with 'control: true'"
                        f"{nearest(control, known)}"
                    )
        return self

    @model_validator(mode="after")
    def _chooses_what_there_is(self) -> Study:
        choices = self.select.choices if self.select else {}
        if choices and len(self.texts) > 1:
            raise ValueError("a study with 'select' has one text: what is chosen on one need not be on another")
        for name, choice in choices.items():
            known = [*self.arms, *(other for other in choices if other != name)]
            if name in self.arms:
                raise ValueError(f"select.choices: {name!r} is an arm; give the choice a name of its own")
            for arm in choice.among:
                if arm not in self.arms:
                    raise ValueError(f"select.choices.{name}: {arm!r} is no arm{nearest(arm, self.arms)}")
            if choice.baseline is not None and choice.baseline not in known:
                raise ValueError(
                    f"select.choices.{name}: baseline {choice.baseline!r} is no arm and no other choice"
                    f"{nearest(choice.baseline, known)}"
                )
        return self


def load_study(name_or_path: str, overrides: Sequence[str] = ()) -> Study:
    """A validated study.

    Args:
        name_or_path: a YAML file, or the name of one in ``studies`` below the current folder.
        overrides: ``a.b=c`` assignments, e.g. ``texts.wikitext2.path=wiki.valid.tokens``, ``seeds=[0,1]``.

    Raises:
        InputError: no such file, an unknown key, a bad value, or data without a path.
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
    values = read_mapping(
        path, "a study is a mapping with recipe, arms, seeds, and texts and perplexity, or pictures and evaluation"
    )
    apply_overrides(values, overrides)
    try:
        study = Study.model_validate(values)
    except ValidationError as error:
        raise explain(error, str(path), Study) from error
    for where, what in _without_path(study):
        raise InputError(f"{what} no path", where=where, remedy=f"Add {where}=FILE to the command.")
    return study


def _without_path(study: Study) -> Iterator[tuple[str, str]]:
    yield from ((f"texts.{name}.path", "the text has") for name, text in study.texts.items() if text.path is None)
    pictures = study.pictures
    if pictures is None or pictures.scenes is not None:
        return
    needed = ["train", "test", *(["development"] if study.select else [])]
    yield from ((f"pictures.{part}", "the pictures have") for part in needed if getattr(pictures, part) is None)
