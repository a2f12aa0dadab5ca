"""Files of routing: whole or not there, and readable whatever wrote them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.routing.shards import (
    ShardReader,
    ShardWriter,
    load_whole,
    merge_shards,
    read_items,
    shard_paths,
)


def _arrays(*values: int) -> dict[str, np.ndarray]:
    """Items of as many tokens as their value, which are all that value."""
    return {
        "lengths": np.array(values),
        "tokens_T": np.repeat(np.array(values, dtype=np.uint16), values),
        "number": np.array(values) * 10,
    }


def test_items_come_back_in_the_order_asked_for_from_several_files(tmp_path: Path) -> None:
    ShardWriter(tmp_path, "scenes.clean", 0).write(["a", "b", "c"], _arrays(1, 2, 3))
    ShardWriter(tmp_path, "scenes.clean", 1).write(["d", "e"], _arrays(4, 5))
    reader = ShardReader(shard_paths(tmp_path, "scenes.clean"))
    assert "d" in reader and "x" not in reader and len(reader) == 5
    found = reader.read(["e", "b", "d", "c"])
    assert found["lengths"].tolist() == [5, 2, 4, 3]
    assert found["tokens_T"].tolist() == [5] * 5 + [2] * 2 + [4] * 4 + [3] * 3
    assert found["tokens_T"].dtype == np.uint16
    assert found["number"].tolist() == [50, 20, 40, 30]
    assert reader.read(["b"])["tokens_T"].tolist() == [2, 2]


def test_a_later_file_of_an_item_counts_and_a_new_start_overwrites_nothing(tmp_path: Path) -> None:
    first = ShardWriter(tmp_path, "t.fog.1", 0).write(["a"], _arrays(1))
    second = ShardWriter(tmp_path, "t.fog.1", 0).write(["a"], _arrays(2))
    assert first != second and first.is_file()
    assert ShardReader(shard_paths(tmp_path, "t.fog.1")).read(["a"])["number"].tolist() == [20]


def test_a_cell_has_its_own_files_only(tmp_path: Path) -> None:
    for stem in ("t.fog.1", "t.fog.1.pgd", "t.fog.15", "at.fog.1"):
        ShardWriter(tmp_path, stem, 0).write([stem], _arrays(1))
    assert ShardReader(shard_paths(tmp_path, "t.fog.1")).items == ["t.fog.1"]


def test_merging_makes_one_sorted_file_whatever_the_order_and_number_of_processes(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    ShardWriter(one, "t", 0).write(["a", "b", "c"], _arrays(1, 2, 3))
    ShardWriter(two, "t", 1).write(["c"], _arrays(3))
    ShardWriter(two, "t", 0).write(["b", "lost"], _arrays(2, 7))
    ShardWriter(two, "t", 0).write(["a"], _arrays(1))
    wanted = ["a", "b", "c", "failed"]
    files = [merge_shards(folder, "t", wanted) for folder in (one, two)]
    assert files[0] is not None and files[1] is not None
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [path.name for path in two.iterdir()] == ["t.all.safetensors"]
    assert load_whole(two, "t")[0] == ["a", "b", "c"]
    before = files[1].stat().st_mtime_ns
    assert merge_shards(two, "t", wanted) == files[1]
    assert files[1].stat().st_mtime_ns == before, "nothing new, nothing written"
    assert merge_shards(two, "u", wanted) is None and load_whole(two, "u") == ([], {})


def test_what_a_power_loss_tore_is_as_if_it_had_not_been_written(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "t", 0)
    kept, torn = writer.write(["a"], _arrays(1)), writer.write(["b"], _arrays(2))
    torn.write_bytes(torn.read_bytes()[:-5])
    empty = writer.write(["c"], _arrays(3))
    empty.write_bytes(b"")
    reader = ShardReader(shard_paths(tmp_path, "t"))
    assert reader.items == ["a"]
    assert read_items(kept) == ["a"] and read_items(torn) == [] and read_items(empty) == []


def test_a_file_that_goes_bad_while_it_is_used_is_named(tmp_path: Path) -> None:
    path = ShardWriter(tmp_path, "t", 0).write(["a"], _arrays(1))
    reader = ShardReader([path])
    path.write_bytes(b"something else")
    with pytest.raises(InputError, match="cannot be read") as e:
        reader.read(["a"])
    assert e.value.where == str(path)
