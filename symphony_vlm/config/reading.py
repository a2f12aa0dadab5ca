"""Reads configuration files and explains what is wrong in them; what recipes and prepared data have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from symphony_vlm.errors import InputError
from symphony_vlm.text import nearest

__all__ = ["config_folder", "explain", "numeric", "read_mapping"]


def config_folder() -> Path:
    """The packaged YAML files, or the repository's ``configs`` in an editable install."""
    package = Path(__file__).parents[1]
    packaged = package / "_configs"
    return packaged if packaged.is_dir() else package.parent / "configs"


MAX_YAML_BYTES = 2**20
MAX_YAML_VALUES = 100_000
"""A file of a few lines can name millions of values through aliases of aliases."""


def read_mapping(path: Path, expected: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: unreadable, too large, not YAML, or no mapping (``expected`` says what it should be).
    """
    try:
        size = path.stat().st_size
        if size > MAX_YAML_BYTES:
            raise InputError(f"has {size:,} bytes; the limit of a settings file is {MAX_YAML_BYTES:,}", where=str(path))
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        _check_number_of_values(values)
    except yaml.YAMLError as error:
        raise InputError(f"not valid YAML: {' '.join(str(error).split())}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text ({error.reason})", where=str(path), remedy="Save it as UTF-8.") from error
    except RecursionError as error:
        raise InputError("is nested too deeply", where=str(path)) from error
    except _TooManyValues as error:
        problem = f"its aliases stand for more than {MAX_YAML_VALUES:,} values"
        raise InputError(problem, where=str(path), remedy="Write out what is meant.") from error
    if not isinstance(values, dict):
        raise InputError(expected, where=str(path))
    converted: dict[str, Any] = numeric(values)
    return converted


class _TooManyValues(Exception):
    """A document with more values than `MAX_YAML_VALUES`, aliases counted as what they stand for."""


def _check_number_of_values(document: Any) -> None:
    waiting, count = [document], 0
    while waiting:
        value = waiting.pop()
        count += 1
        if count > MAX_YAML_VALUES:  # an alias of what it stands in never ends
            raise _TooManyValues
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def numeric(value: Any) -> Any:
    """YAML 1.1 reads ``1e-3`` as text; in a setting it is a number."""
    if isinstance(value, dict):
        return {key: numeric(item) for key, item in value.items()}
    if isinstance(value, list):
        return [numeric(item) for item in value]
    if isinstance(value, str) and value[:1] in "+-.0123456789":
        try:
            return float(value)
        except ValueError:
            return value
    return value


def explain(error: ValidationError, source: str, schema: type[BaseModel]) -> InputError:
    """Pydantic's first complaint as one sentence that names the key and the nearest valid one."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = list(_keys_at(schema, first["loc"][:-1]))
        key = str(first["loc"][-1])
        return InputError(
            f"unknown key {where!r}{nearest(key, known)}", where=source, remedy=f"Keys: {', '.join(known)}."
        )
    value = first.get("input")
    shown = "" if isinstance(value, (dict, list)) or first["type"] == "missing" else f", got {value!r}"
    message = first["msg"].removeprefix("Value error, ")
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return InputError(f"{where or schema.__name__.lower()}: {message}{shown}{more}", where=source)


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
