"""Cuts a text into training, validation and test part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from symphony_vlm.data.text_lines import articles, read_lines
from symphony_vlm.errors import InputError
from symphony_vlm.files import write_text
from symphony_vlm.study.configuration import StudyText

__all__ = ["PARTS", "split_lines", "write_parts"]

PARTS = ("train", "validation", "test")
STRETCH = 100
"""Lines that stay together where there are no articles."""
_OF_TEN = ("train", "train", "test", "train", "train", "validation", "train", "train", "test", "train")
"""Parts of ten units in turn, spread out, as a text may change on its way (reviews sorted by verdict)."""


def split_lines(lines: Sequence[str], by: str) -> dict[str, list[str]]:
    """Lines of each part, in their order: of ten units seven train, one validates, two test.

    Args:
        lines: the text.
        by: ``article``, or ``lines``: stretches of 100.

    Raises:
        InputError: the text has less than ten units.
    """
    units = articles(lines) if by == "article" else [index // STRETCH for index in range(len(lines))]
    count = len(set(units))
    if count < len(_OF_TEN):
        raise InputError(
            f"the text has {count} {'articles' if by == 'article' else f'stretches of {STRETCH} lines'}, "
            f"{len(_OF_TEN)} are needed",
            where="study",
            remedy="Give a longer text, or by: lines for one without titles.",
        )
    parts: dict[str, list[str]] = {name: [] for name in PARTS}
    for line, unit in zip(lines, units, strict=True):
        parts[_OF_TEN[unit % len(_OF_TEN)]].append(line)
    return parts


def write_parts(text: StudyText, folder: Path) -> dict[str, Path]:
    """Writes the parts as text files, unless they are there and the same.

    Raises:
        InputError: the text cannot be read, or the folder holds parts of another.
    """
    assert text.path is not None
    parts = split_lines(read_lines(text.path, subset=text.subset, split=text.split), text.by)
    parts["test"] = parts["test"][: text.test_lines]
    paths = {name: folder / f"{name}.txt" for name in PARTS}
    for name, path in paths.items():
        content = "".join(f"{line}\n" for line in parts[name])
        if path.is_file() and path.read_text(encoding="utf-8") != content:
            raise InputError(
                f"holds another text than {text.path} gives now",
                where=str(path),
                remedy="Give another --output.",
            )
        write_text(path, content)
    return paths
