"""Rows of the files that benchmarks come in: JSON, JSON lines, TSV, CSV and parquet, each with its place for messages.

Benchmarks are small (at most some ten thousand rows), so all rows are read at once; images stay encoded.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symphony_vlm.data.data_files import find_data_files
from symphony_vlm.data.fields import ImageReader, is_given, shortened
from symphony_vlm.data.hub import is_hub_id, open_hub_table
from symphony_vlm.data.json_records import describe_json_error
from symphony_vlm.data.sample import ImageRef
from symphony_vlm.data.tables import TableRows, open_saved_table, open_table_files
from symphony_vlm.errors import InputError

__all__ = ["Row", "file_sha256", "read_json", "read_rows", "read_text"]

MAX_BYTES = 4 * 2**30
"""Files above this are not read: no benchmark's annotations or predictions come near it."""


@dataclass(frozen=True)
class Row:
    """One record and where it stands."""

    fields: Mapping[str, Any]
    where: str

    def error(self, problem: str, *, remedy: str | None = None) -> InputError:
        """An error about this row."""
        return InputError(problem, where=self.where, remedy=remedy)

    def get(self, *names: str) -> Any:
        """The first of the fields that is there and not null."""
        for name in names:
            if self.fields.get(name) is not None:
                return self.fields[name]
        listed = " or ".join(repr(name) for name in names)
        raise self.error(f"field {listed} is missing", remedy=f"Fields: {', '.join(map(str, self.fields)) or 'none'}.")

    def text(self, *names: str) -> str:
        """The first of the fields that is there, as text; a number is written out, an integer without a point."""
        value = self.get(*names)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, float):
            return str(int(value)) if value.is_integer() else str(value)
        if not isinstance(value, str):
            name = next(name for name in names if self.fields.get(name) is not None)
            raise self.error(f"field {name!r} is {shortened(value)}; it must be text")
        return value

    def images(self, *names: str, folder: Path | None) -> tuple[ImageRef, ...]:
        """References to the pictures of the first field that is there: paths, base64 or bytes. None is opened."""
        for name in names:
            if is_given(self.fields.get(name)) and self.fields[name] != "":
                reader = ImageReader(origin=self.where, row=self.where, folder=folder or Path())
                return tuple(reader.several(self.fields[name], name))
        return ()


def read_rows(
    path: Path,
    *,
    as_pairs: tuple[str, str] | None = None,
    inside: Sequence[str] = (),
    split: str | None = None,
    subset: str | None = None,
) -> list[Row]:
    """All rows of a file, of a folder of parquet files, or of a data set of the hub.

    Args:
        path: ``.json`` (a list of objects, or an object that holds one under a name of ``inside``), ``.jsonl``,
            ``.tsv`` or ``.csv`` with a header, ``.parquet``, ``.arrow``, a folder of the last two, or
            ``organisation/name`` on the hub. A ``.json`` with one object a line (POPE) is read as such.
        as_pairs: Names of two fields: a JSON object ``{a: b}`` becomes rows with these; where b is an object, its
            fields join the first.
        inside: Names under which a JSON object may hold its list.
        split: Which split of a folder or hub data set; a file is taken as it is.
        subset: Which configuration of a hub data set.

    Raises:
        InputError: Not there, not readable, or not of this form; names file and record.
    """
    if not path.exists():
        if not is_hub_id(path.as_posix()):
            raise InputError("does not exist", where=str(path), remedy=f"Relative paths start at {Path.cwd()}.")
        return _table_rows(open_hub_table(path.as_posix(), subset=subset, split=split, any_columns=True), path.name)
    if path.is_dir():
        file_format, files = find_data_files(path, split)
        if file_format == "saved":
            return _table_rows(open_saved_table(files[0], any_columns=True), path.name)
        if file_format in ("parquet", "arrow"):
            return _table_rows(open_table_files(path, files, file_format, any_columns=True), path.name)
    suffix = path.suffix.lower()
    if suffix in (".parquet", ".arrow"):
        return _table_rows(open_table_files(path, [path], suffix[1:], any_columns=True), path.name)
    if suffix in (".tsv", ".csv"):
        return _separated_rows(path, "\t" if suffix == ".tsv" else ",")
    if suffix in (".json", ".jsonl"):
        text = read_text(path)
        if suffix == ".jsonl" or (value := _one_value(text, path)) is None:
            return _json_lines(text, path)
        return _json_rows(value, path, as_pairs, inside)
    raise InputError(
        f"has the extension {path.suffix!r}" if suffix else "has no extension that says what it is",
        where=str(path),
        remedy="Give .json, .jsonl, .tsv, .csv, .parquet, or a folder of parquet files.",
    )


def read_text(path: Path) -> str:
    """A file's text, of UTF-8 with or without a mark.

    Raises:
        InputError: Not there, not a file, not UTF-8, or larger than 4 GiB.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"has {path.stat().st_size:,} bytes; the limit is {MAX_BYTES:,}", where=str(path))
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"line {line} is not UTF-8 text", where=str(path), remedy="Save it as UTF-8.") from error


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        InputError: Not readable, or not JSON (with line and column).
    """
    return _parsed(read_text(path), str(path))


def file_sha256(path: Path) -> str:
    """sha256 of a file; of a folder, over the relative names and contents of all its files."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else _folder_sha256(path)


def _folder_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        digest.update(f"{name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(describe_json_error(error), where=where) from error


def _one_value(text: str, path: Path) -> Any:
    """The value of the file, or None if every line is one of its own."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        first = text.lstrip().partition("\n")[0]
        if error.msg == "Extra data" and first.startswith("{"):
            return None
        raise InputError(describe_json_error(error), where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise InputError(describe_json_error(error), where=str(path)) from error


def _json_lines(text: str, path: Path) -> list[Row]:
    rows = []
    # Only at line feeds: str.splitlines also cuts at U+2028, which may stand inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        # SEED-Bench's authors publish results with a comma after each line.
        line = line.strip().removesuffix(",")
        if line:
            where = f"{path.name}: line {number}"
            rows.append(_row(_parsed(line, where), where))
    return _not_empty(rows, path)


def _json_rows(value: Any, path: Path, as_pairs: tuple[str, str] | None, inside: Sequence[str]) -> list[Row]:
    name = path.name
    if isinstance(value, dict):
        held = next((value[key] for key in inside if isinstance(value.get(key), list)), None)
        if held is None and as_pairs is not None:
            key_field, value_field = as_pairs
            return _not_empty(
                [
                    Row(
                        {**(item if isinstance(item, dict) else {value_field: item}), key_field: key},
                        f"{name}: entry {shortened(key)}",
                    )
                    for key, item in value.items()
                ],
                path,
            )
        value = [value] if held is None and not inside else held
    if not isinstance(value, list):
        names = f", or an object with {' or '.join(map(repr, inside))}" if inside else ""
        raise InputError(f"must hold a list of objects{names}", where=str(path))
    return _not_empty([_row(item, f"{name}: record {index}") for index, item in enumerate(value)], path)


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"is {shortened(value)}; it must be an object", where=where)
    return Row(value, where)


def _not_empty(rows: list[Row], path: Path) -> list[Row]:
    if not rows:
        raise InputError("holds no records", where=str(path), remedy="Check that the right file was given.")
    return rows


def _separated_rows(path: Path, delimiter: str) -> list[Row]:
    rows = []
    limit = csv.field_size_limit(2**31 - 1)  # pictures as base64 text pass the default by far
    try:
        reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
        header = next(reader, [])
        for number, values in enumerate(reader):
            where = f"{path.name}: row {number}"
            if not values:
                continue
            if len(values) != len(header):
                raise InputError(f"has {len(values)} columns; the header has {len(header)}", where=where)
            rows.append(Row(dict(zip(header, values, strict=True)), where))
    except csv.Error as error:
        raise InputError(f"cannot be read as a table: {error}", where=str(path)) from error
    finally:
        csv.field_size_limit(limit)
    return _not_empty(rows, path)


def _table_rows(table: TableRows, name: str) -> list[Row]:
    return [Row(table[index], f"{name}: {table.label(index)}") for index in range(len(table))]
