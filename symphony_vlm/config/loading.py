"""Finds, reads, overrides and validates recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from symphony_vlm.config.inheritance import read_recipe
from symphony_vlm.config.prepared import put_prepared_data
from symphony_vlm.config.reading import config_folder, explain, numeric, read_mapping
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.errors import InputError
from symphony_vlm.text import nearest

if TYPE_CHECKING:
    from symphony_vlm.moe.configuration import MoEConfig

__all__ = ["apply_overrides", "config_folder", "list_recipes", "load_moe_settings", "load_recipe"]


def list_recipes() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.stem for path in (config_folder() / "recipes").glob("*.yaml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """A validated recipe.

    Args:
        name_or_path: a packaged recipe's name, or a YAML file.
        overrides: ``a.b=c`` assignments; the value is read as YAML. List items by index: ``stages.1.epochs=2``, or
            stages by name: ``stages.instruct.epochs=2``. ``data=NAME`` takes prepared data (`list_prepared`).

    Raises:
        InputError: no such recipe, invalid YAML, an unknown key (the nearest valid one is named), or a bad value.
    """
    path = _find(name_or_path)
    values = read_recipe(path, _find)
    for override in overrides:
        before = values.get("data")
        apply_overrides(values, [override])
        put_prepared_data(values, before)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise explain(error, str(path), Recipe) from error
    _check_names(recipe)
    return recipe


def load_moe_settings(name_or_path: str, overrides: Sequence[str] = ()) -> MoEConfig:
    """Settings of sparse layers: a recipe's ``model.moe``, or a YAML file of these settings alone.

    Args:
        name_or_path: a packaged recipe's name, or a YAML file: a recipe, or the settings, perhaps below ``moe``.
        overrides: ``a.b=c`` assignments to what is written there, see `load_recipe`.

    Raises:
        InputError: no such file, a recipe without ``model.moe``, an unknown key or a bad value.
    """
    from symphony_vlm.moe.configuration import MoEConfig

    path = _find(name_or_path)
    values = read_mapping(path, "settings of sparse layers are a mapping")
    if "model" in values or "base" in values:
        settings = load_recipe(name_or_path, overrides).model.moe
        if settings is None:
            raise InputError(
                "the recipe has no model.moe", where=str(path), remedy="Add model.moe.router=symphony_smoe."
            )
        return MoEConfig.from_dict(settings)
    apply_overrides(values, overrides)
    return MoEConfig.from_dict(values["moe"] if isinstance(values.get("moe"), dict) else values)


def _check_names(recipe: Recipe) -> None:
    """What the schema cannot know. A wrong word must not be found only when its stage begins, hours later."""
    from symphony_vlm.data.templates import check_template_name, get_template

    check_template_name(recipe.model.template)
    pretrained = recipe.model.language.name is not None and not recipe.model.random_weights
    if recipe.model.template == "tokenizer" and not pretrained and recipe.model.start is None:
        raise InputError(
            "'tokenizer' is the chat template of a pretrained model's tokenizer, and this model is new",
            where="model.template",
            remedy="Name a built-in template, e.g. compact.",
        )
    for stage in recipe.stages:
        if stage.template is not None:
            get_template(stage.template)
    if recipe.model.moe is not None:
        from symphony_vlm.moe.configuration import MoEConfig

        MoEConfig.from_dict(recipe.model.moe)
    if recipe.evaluation.corruptions:
        from symphony_vlm.corruptions import parse_corruptions

        parse_corruptions(",".join(recipe.evaluation.corruptions))
    if recipe.data.augmentation is not None:
        from symphony_vlm.corruptions import parse_corruptions

        if not parse_corruptions(",".join(recipe.data.augmentation.corruptions)):
            raise InputError("names no corruption", where="data.augmentation.corruptions", remedy="Leave it out.")


def _find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError("no such file", where=str(path), remedy="Give a recipe's name or an existing YAML file.")
        return path
    packaged = config_folder() / "recipes" / f"{name_or_path}.yaml"
    if not packaged.is_file():
        names = list_recipes()
        raise InputError(
            f"no recipe of that name{nearest(name_or_path, names)}",
            where=name_or_path,
            remedy=f"Recipes: {', '.join(names)}; or give a path that ends in .yaml.",
        )
    return packaged


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Applies ``a.b=c`` assignments to nested mappings and lists, in place."""
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise InputError("an override has the form a.b=c", where=f"override {override!r}")
        try:
            value = yaml.safe_load(text) if text else ""
        except yaml.YAMLError as error:
            raise InputError(f"{text!r} is not valid YAML", where=f"override {key}") from error
        _assign(values, key.split("."), numeric(value), key)


def _assign(target: Any, path: list[str], value: Any, key: str) -> None:
    head, rest = path[0], path[1:]
    if isinstance(target, list):
        index = _list_index(target, head, key)
        if rest:
            _assign(target[index], rest, value, key)
        else:
            target[index] = value
    elif isinstance(target, dict):
        if not rest:
            target[head] = value
            return
        if target.get(head) is None:
            target[head] = {}
        _assign(target[head], rest, value, key)
    else:
        raise InputError(f"{head!r} is inside a value that is no mapping ({target!r})", where=f"override {key}")


def _list_index(items: list[Any], head: str, key: str) -> int:
    if head.isdigit() and int(head) < len(items):
        return int(head)
    names = [str(item.get("name")) if isinstance(item, dict) else "" for item in items]
    if head in names:
        return names.index(head)
    raise InputError(
        f"{head!r} is neither an index below {len(items)} nor one of {', '.join(names)}{nearest(head, names)}",
        where=f"override {key}",
    )
