"""The recipes of a study with pictures: one of what all arms share, and one of what each arm does from there on."""

from __future__ import annotations

import functools
import json

import yaml

from symphony_vlm.config.loading import load_recipe
from symphony_vlm.config.recipe import Recipe, SourceConfig
from symphony_vlm.errors import InputError
from symphony_vlm.study.configuration import Study

__all__ = ["arm_recipe", "recipe_text", "start_recipe", "with_pictures"]


def start_recipe(study: Study, seed: int) -> Recipe | None:
    """The stages before the one that upcycles; None if it is the first."""
    recipe, index = _whole(study, seed)
    return None if index == 0 else recipe.model_copy(update={"stages": recipe.stages[:index]})


def arm_recipe(study: Study, arm: str, seed: int, start: str | None) -> Recipe:
    """The other stages with the arm's settings, from the saved model ``start`` on.

    Raises:
        InputError: a setting changes what is trained before, which all arms share.
    """
    base, index = _whole(study, seed)
    recipe = _load(study.recipe, (*study.settings, *study.arms[arm].settings, f"seed={seed}"))
    for name, shared, own in (
        ("the stages before the one that upcycles", base.stages[:index], recipe.stages[:index]),
        ("data", base.data, recipe.data),
        ("model", _without_moe(base), _without_moe(recipe)),
    ):
        if index and shared != own:
            raise InputError(
                f"the arm's settings change {name}, and all arms start from the same model",
                where=f"arm {arm!r}",
                remedy="Put the setting into the study's settings, or give the arm a study of its own.",
            )
    model = recipe.model.model_copy(update={"start": start}) if start else recipe.model
    return recipe.model_copy(update={"name": f"{recipe.name}_{arm}", "model": model, "stages": recipe.stages[index:]})


def with_pictures(
    recipe: Recipe, *, train: str, captions: str | None, image_folder: str | None, feature_cache: str, checked: bool
) -> Recipe:
    """The recipe on these files, with features of frozen vision towers in that folder.

    Args:
        recipe: of the start or of an arm.
        train: data file.
        captions: data file; None: what the recipe has.
        image_folder: base of the training file's image paths; None: its folder.
        feature_cache: folder.
        checked: whether a run before this one has decoded every picture.
    """
    data = recipe.data.model_copy(
        update={
            "scenes": None,
            "train": [SourceConfig(path=train, image_folder=image_folder)],
            "captions": recipe.data.captions if captions is None else [SourceConfig(path=captions)],
            "feature_cache": feature_cache,
            "check_images": recipe.data.check_images and not checked,
        }
    )
    return recipe.model_copy(update={"data": data})


def recipe_text(recipe: Recipe) -> str:
    """As YAML, every setting written out."""
    return yaml.safe_dump(json.loads(recipe.model_dump_json()), sort_keys=False)


@functools.lru_cache(maxsize=512)
def _load(name: str, settings: tuple[str, ...]) -> Recipe:
    """Every job is described several times."""
    return load_recipe(name, settings)


def _whole(study: Study, seed: int) -> tuple[Recipe, int]:
    """The recipe without any arm's settings, and the place of the stage that upcycles."""
    recipe = _load(study.recipe, (*study.settings, f"seed={seed}"))
    index = next((place for place, stage in enumerate(recipe.stages) if stage.upcycle), None)
    if index is None:
        raise InputError("no stage upcycles, so no arm has a router", where=f"recipe {study.recipe!r}")
    if index and recipe.stages[index - 1].kind != "multimodal":
        raise InputError(
            "the stage before the one that upcycles trains no vision-language model that arms could start from",
            where=f"recipe {study.recipe!r}, stage {recipe.stages[index - 1].name!r}",
            remedy="Put a multimodal stage between them.",
        )
    return recipe, index


def _without_moe(recipe: Recipe) -> object:
    return recipe.model.model_copy(update={"moe": None})
