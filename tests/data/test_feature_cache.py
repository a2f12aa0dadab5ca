"""Features on disk: exact, memory-mapped, filled by several processes at once, whole after a kill."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from symphony_vlm.data.feature_cache import FeatureCache
from symphony_vlm.errors import InputError

SIZE = (20, 30)


def key(name: object) -> bytes:
    return hashlib.sha256(str(name).encode()).digest()


def features_of(number: int, *, rows: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(rows, 4, 8, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_come_back_bit_for_bit_from_another_cache_object(tmp_path: Path, dtype: torch.dtype) -> None:
    """Pictures may have different numbers of rows: one, or one per tile."""
    expected = {key(i): features_of(i, rows=1 + i % 3, dtype=dtype) for i in range(10)}
    cache = FeatureCache(tmp_path)
    for part in (list(expected)[:4], list(expected)[4:]):
        cache.add(part, [expected[name] for name in part], [SIZE] * len(part))
    for opened in (cache, FeatureCache(tmp_path), pickle.loads(pickle.dumps(cache))):
        assert len(opened) == 10
        for name, value in expected.items():
            found, size = opened[name]
            assert name in opened and found.dtype == dtype and size == SIZE
            assert torch.equal(found, value)
    assert key("unknown") not in cache


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    """200 MB of features; opening the cache and one picture may take only a small part of that memory."""
    features = [torch.ones(1, 64, 8192) * i for i in range(100)]
    FeatureCache(tmp_path).add([key(i) for i in range(100)], features, [SIZE] * 100)
    del features
    before = _anonymous_memory()
    cache = FeatureCache(tmp_path)
    assert float(cache[key(57)][0].mean()) == 57
    assert _anonymous_memory() - before < 30 * 2**20


def _anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    pytest.skip("the system does not tell apart memory with and without a file behind it")


WRITER = """
import sys, torch
from pathlib import Path
from symphony_vlm.data.feature_cache import FeatureCache

cache, first = FeatureCache(Path(sys.argv[1])), int(sys.argv[2])
for start in range(first, first + 20, 5):
    numbers = range(start, start + 5)
    features = [torch.full((1, 4, 8), float(i)) for i in numbers]
    cache.add([bytes([i] * 32) for i in numbers], features, [(1, i) for i in numbers])
"""


def test_several_processes_fill_one_folder_at_once(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(first)]) for first in (0, 10)]
    assert [writer.wait() for writer in writers] == [0, 0]
    cache = FeatureCache(tmp_path)
    # Numbers 10 to 19 were written by both.
    assert len(cache) == 30
    for i in range(30):
        features, size = cache[bytes([i] * 32)]
        assert torch.equal(features, torch.full((1, 4, 8), float(i))) and size == (1, i)


def test_a_refresh_takes_up_what_others_have_written(tmp_path: Path) -> None:
    ours, theirs = FeatureCache(tmp_path), FeatureCache(tmp_path)
    theirs.add([key(1)], [features_of(1)], [SIZE])
    assert key(1) not in ours
    ours.refresh()
    assert torch.equal(ours[key(1)][0], features_of(1))


def test_a_shard_torn_by_a_kill_is_not_seen(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache.add([key(1)], [features_of(1)], [SIZE])
    whole = next(tmp_path.glob("*.safetensors")).read_bytes()
    (tmp_path / ".half.safetensors.tmp").write_bytes(whole[: len(whole) // 2])
    assert len(FeatureCache(tmp_path)) == 1


def test_a_damaged_shard_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(b"not a shard")
    with pytest.raises(InputError, match=r"damaged\.safetensors.*Remove the file"):
        FeatureCache(tmp_path)
