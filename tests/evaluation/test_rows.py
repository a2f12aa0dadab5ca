"""Rows of benchmark files: formats, and what is wrong in one clear message."""

from __future__ import annotations

from pathlib import Path

import pytest

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.rows import Row, file_sha256, read_rows


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '[{"x": "1"}, {"x": "2"}]'),
        ("a.json", '{"questions": [{"x": "1"}, {"x": "2"}]}'),
        ("a.json", '{"x": "1"}\n{"x": "2"}\n'),  # JSON lines named .json, as POPE's
        ("a.jsonl", '{"x": "1"}\n\n  {"x": "2"}'),
        ("a.tsv", "x\ty\n1\t\n2\tb\n"),
        ("a.csv", 'x,y\n1,"a, b\nc"\n2,\n'),
    ],
)
def test_formats(tmp_path: Path, name: str, content: str) -> None:
    rows = read_rows(write(tmp_path / name, content), inside=("questions",))
    assert [row.text("x") for row in rows] == ["1", "2"]
    assert all(name in row.where for row in rows)


def test_an_object_of_entries(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '{"7": "text", "8": {"y": 1, "id": "other"}}')
    rows = read_rows(path, as_pairs=("id", "y"))
    assert [row.fields for row in rows] == [{"id": "7", "y": "text"}, {"id": "8", "y": 1}]


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    assert len(read_rows(write(tmp_path / "a.jsonl", '{"x": "a\u2028b"}\n'))) == 1


def test_long_fields_of_tables(tmp_path: Path) -> None:
    """Pictures as base64 text pass the csv module's default limit of 131,072 characters."""
    rows = read_rows(write(tmp_path / "a.tsv", "x\timage\n1\t" + "A" * 200_000 + "\n"))
    assert len(rows[0].fields["image"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"x": ', r"a.json: is not valid JSON at column 7"),
        ("a.json", "[1]", r"a.json: record 0: is 1; it must be an object"),
        ("a.json", '{"other": []}', r"must hold a list of objects, or an object with 'questions'"),
        ("a.json", "[]", "holds no records"),
        ("a.json", "[" * 200_000, "nested too deeply"),
        ("a.json", '{"x": 1}\n{"x": ', r"a.json: line 2: is not valid JSON"),
        ("a.jsonl", b'{"x": "\xff"}\n', r"line 1 is not UTF-8"),
        ("a.tsv", "x\ty\n1\t2\t3\n", r"a.tsv: row 0: has 3 columns; the header has 2"),
        ("a.tsv", "", "holds no records"),
        ("a.xlsx", "", r"has the extension '.xlsx'"),
        ("a", "", "has no extension"),
        ("a.parquet", "x", "cannot be read as parquet"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_rows(write(tmp_path / name, content), inside=("questions",))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_rows(tmp_path / "absent.json")


def test_fields() -> None:
    row = Row({"a": None, "b": 3, "c": 3.0, "d": 2.5, "e": "x", "f": True}, "file: line 1")
    assert [row.text("a", "b"), row.text("c"), row.text("d"), row.text("e")] == ["3", "3", "2.5", "x"]
    with pytest.raises(InputError, match="file: line 1: field 'a' or 'z' is missing"):
        row.get("a", "z")
    with pytest.raises(InputError, match="field 'f' is True; it must be text"):
        row.text("a", "f")


def test_hashes(tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    for folder in (first, second):
        folder.mkdir()
        write(folder / "a.txt", "a")
    assert file_sha256(first) == file_sha256(second)
    write(second / "a.txt", "b")
    assert file_sha256(first) != file_sha256(second)
    assert file_sha256(first / "a.txt").startswith("ca978112ca1bbdca")
