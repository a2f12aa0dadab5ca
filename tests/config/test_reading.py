"""Limits on settings files that somebody else has written."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from symphony_vlm.config.reading import MAX_YAML_BYTES, read_mapping
from symphony_vlm.errors import InputError


def _aliases_of_aliases(depth: int) -> str:
    """Ten to the power of `depth` values in a few lines ("billion laughs")."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, depth)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (_aliases_of_aliases(9).encode(), "its aliases stand for more than 100,000 values"),
        (b"a: &a [*a]", "its aliases stand for more than 100,000 values"),
        (b"a: " + b"[" * 20_000, "nested too deeply"),
        (b"a: " + b"[" * 3_000 + b"]" * 3_000, "nested too deeply"),
        (b"a: b\n" * (MAX_YAML_BYTES // 5 + 1), "bytes; the limit of a settings file is 1,048,576"),
        (b"a: \xff\xfe", "is not UTF-8 text"),
        (b"a: !!python/object/apply:os.system ['true']", "not valid YAML"),
        (b"a: [", "not valid YAML"),
        (b"- a", "a mapping is expected"),
    ],
    ids=["aliases", "alias of itself", "brackets", "deep", "size", "encoding", "object", "syntax", "list"],
)
def test_a_file_that_asks_for_too_much_is_refused_at_once(content: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(InputError, match=complaint) as caught:
        read_mapping(path, "a mapping is expected")
    assert str(path) in str(caught.value)
    assert time.process_time() - start < 5


def test_anchors_as_people_use_them_work(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("rates: &rates {projector: 1e-3}\nstages: [{train: *rates}, {train: *rates}]\n")
    assert read_mapping(path, "")["stages"] == [{"train": {"projector": 0.001}}] * 2
