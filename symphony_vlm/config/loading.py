"""Finds, reads, overrides and validates recipes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from symphony_vlm.config.recipe import Recipe
from symphony_vlm.errors import InputError
from symphony_vlm.text import nearest

if TYPE_CHECKING:
    from symphony_vlm.moe.configuration import MoEConfig

__all__ = ["apply_overrides", "config_folder", "list_recipes", "load_moe_settings", "load_recipe"]


def config_folder() -> Path:
    """The packaged YAML files, or the repository's ``configs`` in an editable install."""
    package = Path(__file__).parents[1]
    packaged = package / "_configs"
    return packaged if packaged.is_dir() else package.parent / "configs"


def list_recipes() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.stem for path in (config_folder() / "recipes").glob("*.yaml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """A validated recipe.

    Args:
        name_or_path: a packaged recipe's name, or a YAML file.
        overrides: ``a.b=c`` assignments; the value is read as YAML. List items by index: ``stages.1.epochs=2``, or
            stages by name: ``stages.instruct.epochs=2``.

    Raises:
        InputError: no such recipe, invalid YAML, an unknown key (the nearest valid one is named), or a bad value.
    """
    path = _find(name_or_path)
    values = _read(path, "a recipe is a mapping with model, data and stages")
    apply_overrides(values, overrides)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise _explain(error, str(path)) from error
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
    values = _read(path, "settings of sparse layers are a mapping")
    if "model" in values:
        settings = load_recipe(name_or_path, overrides).model.moe
        if settings is None:
            raise InputError(
                "the recipe has no model.moe", where=str(path), remedy="Add model.moe.router=symphony_smoe."
            )
        return MoEConfig.from_dict(settings)
    apply_overrides(values, overrides)
    return MoEConfig.from_dict(values["moe"] if isinstance(values.get("moe"), dict) else values)


def _read(path: Path, expected: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"not valid YAML: {' '.join(str(error).split())}", where=str(path)) from error
    if not isinstance(values, dict):
        raise InputError(expected, where=str(path))
    numeric: dict[str, Any] = _numeric(values)
    return numeric


def _check_names(recipe: Recipe) -> None:
    """What the schema cannot know. A wrong word must not be found only when its stage begins, hours later."""
    from symphony_vlm.data.templates import check_template_name, get_template

    check_template_name(recipe.model.template)
    if recipe.model.template == "tokenizer" and recipe.model.language.name is None and recipe.model.start is None:
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
        from symphony_vlm.evaluation.corruptions import parse_corruptions

        parse_corruptions(",".join(recipe.evaluation.corruptions))


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
        _assign(values, key.split("."), _numeric(value), key)


def _numeric(value: Any) -> Any:
    """YAML 1.1 reads ``1e-3`` as text; in a setting it is a number."""
    if isinstance(value, dict):
        return {key: _numeric(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numeric(item) for item in value]
    if isinstance(value, str) and value[:1] in "+-.0123456789":
        try:
            return float(value)
        except ValueError:
            return value
    return value


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


def _explain(error: ValidationError, source: str) -> InputError:
    """Pydantic's first complaint as one sentence that names the key and the nearest valid one."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = list(_keys_at(Recipe, first["loc"][:-1]))
        key = str(first["loc"][-1])
        return InputError(
            f"unknown key {where!r}{nearest(key, known)}", where=source, remedy=f"Keys: {', '.join(known)}."
        )
    value = first.get("input")
    shown = "" if isinstance(value, (dict, list)) or first["type"] == "missing" else f", got {value!r}"
    message = first["msg"].removeprefix("Value error, ")
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return InputError(f"{where or 'recipe'}: {message}{shown}{more}", where=source)


def _keys_at(schema: type[BaseModel], location: Sequence[int | str]) -> Iterator[str]:
    """The keys that the schema knows at a place of the tree."""
    current: Any = schema
    for part in location:
        if isinstance(part, int) or not (isinstance(current, type) and issubclass(current, BaseModel)):
            continue
        field = current.model_fields.get(str(part))
        current = _schema_in(field.annotation) if field else None
    if isinstance(current, type) and issubclass(current, BaseModel):
        yield from current.model_fields


def _schema_in(annotation: Any) -> Any:
    """The schema class inside an annotation such as ``list[StageConfig] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _schema_in(part)) is not None), None)
