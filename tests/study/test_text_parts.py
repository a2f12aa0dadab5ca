"""Texts are cut into parts that share nothing."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest

from symphony_vlm.errors import InputError
from symphony_vlm.study.configuration import StudyText
from symphony_vlm.study.text_parts import split_lines, write_parts


def test_articles_are_kept_whole_and_parts_share_nothing() -> None:
    lines = [line for number in range(20) for line in (f" = T{number} = ", f"text {number}", "")]
    parts = split_lines(lines, "article")
    assert sorted(chain.from_iterable(parts.values())) == sorted(lines)
    numbers = {name: {line.split()[-1] for line in part if line.startswith("text")} for name, part in parts.items()}
    assert {name: len(found) for name, found in numbers.items()} == {"train": 14, "validation": 2, "test": 4}
    for number in range(20):
        assert sum(f" = T{number} = " in part and f"text {number}" in part for part in parts.values()) == 1


def test_stretches_of_lines_and_texts_too_short(tmp_path: Path) -> None:
    lines = [f"line {number}" for number in range(1000)]
    parts = split_lines(lines, "lines")
    assert {name: len(part) for name, part in parts.items()} == {"train": 700, "validation": 100, "test": 200}
    with pytest.raises(InputError, match="1 articles, 10 are needed"):
        split_lines(lines, "article")
    file = tmp_path / "a.txt"
    file.write_text("\n".join(lines))
    text = StudyText(path=str(file), by="lines", test_lines=30)
    paths = write_parts(text, tmp_path / "parts")
    assert len(paths["test"].read_text().splitlines()) == 30
    assert write_parts(text, tmp_path / "parts") == paths
    file.write_text("\n".join(reversed(lines)))
    with pytest.raises(InputError, match="holds another text"):
        write_parts(text, tmp_path / "parts")
