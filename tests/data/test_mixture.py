"""Weights, and records left out by a list of faults."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from symphony_vlm.data.mixture import MixturePart, SampleList, WithoutRecords, repeated
from symphony_vlm.data.sample import Message, Sample, TextPart
from symphony_vlm.data.skip_list import check_range, read_skip_lists
from symphony_vlm.errors import InputError

SOURCES = {"a.json": "data/a.json", "b.json": "other/b.json"}


def samples(name: str, number: int) -> list[Sample]:
    message = Message(role="user", parts=(TextPart(text="?"),))
    return [Sample(id=f"{name}{i}", origin=name, messages=(message,)) for i in range(number)]


@given(
    st.lists(st.integers(0, 1000), unique=True, max_size=40), st.floats(0.01, 5, allow_nan=False), st.integers(0, 100)
)
def test_a_weight_is_how_often_each_record_is_seen(indices: list[int], weight: float, seed: int) -> None:
    chosen = Counter(repeated(indices, weight, seed=seed, label="a"))
    copies = int(weight)
    assert set(chosen) <= set(indices)
    assert all(chosen[index] in (copies, copies + 1) for index in indices)
    assert sum(chosen.values()) == copies * len(indices) + round((weight - copies) * len(indices))


def test_the_random_share_is_a_function_of_seed_and_source() -> None:
    def half(seed: int, label: str) -> list[int]:
        return repeated(range(100), 0.5, seed=seed, label=label)

    assert half(0, "a") == half(0, "a")
    assert half(0, "a") != half(1, "a")
    assert half(0, "a") != half(0, "b")


def test_a_list_of_samples_knows_their_sources() -> None:
    a, b = samples("a", 3), samples("b", 2)
    one = SampleList(
        [MixturePart(label="a", source=a, indices=[2, 0, 2]), MixturePart(label="b", source=b, indices=[1])]
    )
    both = SampleList.join([one, SampleList([MixturePart(label="a", source=a, indices=[1])])])
    assert [sample.id for sample in both] == ["a2", "a0", "a2", "b1", "a1"]
    assert both.labels == ("a", "b")
    assert [both.labels[both.source_number(i)] for i in range(5)] == ["a", "a", "a", "b", "a"]
    assert len(both.with_images()) == 0


def test_a_source_without_some_records() -> None:
    view = WithoutRecords(samples("a", 5), {1, 4})
    assert [sample.id for sample in view] == ["a0", "a2", "a3"]
    assert view.indices == [0, 2, 3]
    assert [sample.id for sample in view[1:]] == ["a2", "a3"]


def listed(folder: Path, *lines: object) -> Path:
    path = folder / "faults.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_listed_records_are_found_by_the_name_of_their_file(tmp_path: Path) -> None:
    entries = [{"file": name, "index": i, "id": "x", "reason": "y"} for i, name in enumerate(["a.json", "data/a.json"])]
    path = listed(tmp_path, *entries, "", {"file": "/elsewhere/b.json", "index": 7})
    assert read_skip_lists([path], SOURCES) == {"a.json": {0, 1}, "b.json": {7}}
    assert read_skip_lists([], SOURCES) == {"a.json": set(), "b.json": set()}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"file": "c.json", "index": 1}, "'c.json' is none of the data files; did you mean"),
        ({"file": "a.json", "index": -1}, "names no record"),
        ({"file": "a.json", "index": True}, "names no record"),
        ({"file": "a.json"}, "names no record"),
        ({"index": 1}, "names no record"),
        ([1], "names no record"),
        ("{", "is not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(InputError, match=r"faults\.jsonl: line 2") as error:
        read_skip_lists([listed(tmp_path, {"file": "a.json", "index": 0}, line)], SOURCES)
    assert message in str(error.value)


def test_a_name_that_two_sources_have_is_refused(tmp_path: Path) -> None:
    sources = {"x/a.json": "x/a.json", "y/a.json": "y/a.json"}
    with pytest.raises(InputError, match="may be any of x/a.json, y/a.json"):
        read_skip_lists([listed(tmp_path, {"file": "a.json", "index": 0})], sources)
    assert read_skip_lists([listed(tmp_path, {"file": "y/a.json", "index": 0})], sources)["y/a.json"] == {0}


def test_a_missing_list_and_an_index_that_a_file_does_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_skip_lists([tmp_path / "no.jsonl"], SOURCES)
    check_range({0, 9}, 10, "a.json")
    with pytest.raises(InputError, match=r"index 10 is listed for a.json, which has 10 records"):
        check_range({3, 10, 12}, 10, "a.json")
