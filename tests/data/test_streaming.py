"""Streams: the same order everywhere, shares of processes and workers, every kind of file, and bounded memory."""

from __future__ import annotations

import base64
import io
import itertools
import json
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from symphony_vlm.data.images import image_bytes
from symphony_vlm.data.sample import Sample
from symphony_vlm.data.stream_readers import StreamFile, open_raw_stream
from symphony_vlm.data.streaming import Draw, RecordStream, StreamSource, shard
from symphony_vlm.errors import InputError


def record(number: int, **changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"It is {number}."}]
    return {"id": f"r{number}", "image": f"{number % 7}.png", "conversations": turns, **changes}


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records))
    return path


def source(path: Path, **settings: Any) -> StreamSource:
    raw = open_raw_stream(StreamFile(path=str(path)))
    return StreamSource(label=path.name, raw=raw, image_folder=path.parent, **settings)


def stream(*sources: StreamSource, buffer: int = 4, fraction: float = 0.0, seed: int = 0) -> RecordStream:
    return RecordStream(sources, seed=seed, shuffle_buffer=buffer, validation_fraction=fraction)


def take(draws: Iterator[Draw], number: int) -> list[tuple[str, int]]:
    return [(draw.source.label, draw.index) for draw in itertools.islice(draws, number)]


@pytest.fixture
def two(tmp_path: Path) -> list[StreamSource]:
    a = write(tmp_path / "a.jsonl", [record(i) for i in range(40)])
    b = write(tmp_path / "b.jsonl", [record(100 + i) for i in range(10)])
    return [source(a, weight=3.0), source(b)]


def test_every_round_has_every_record_once_in_another_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [record(i) for i in range(20)])
    found = [index for _, index in take(stream(source(path)).training(), 60)]
    rounds = [found[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(indices) == list(range(20)) for indices in rounds)
    assert len({tuple(indices) for indices in rounds} | {tuple(range(20))}) == 4
    ordered = [index for _, index in take(stream(source(path), buffer=1).training(), 40)]
    assert ordered == [*range(20), *range(20)]


def test_the_order_depends_on_the_seed_alone(two: list[StreamSource]) -> None:
    first = take(stream(*two).training(), 100)
    assert take(stream(*two).training(), 100) == first
    assert take(stream(*two, seed=1).training(), 100) != first
    script = (
        "import sys, itertools; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
        "from test_streaming import source, stream, take;"
        "print(take(stream(source(Path(sys.argv[2]), weight=3.0), source(Path(sys.argv[3]))).training(), 100))"
    )
    paths = [str(part.image_folder / part.label) for part in two]
    command = [sys.executable, "-c", script, str(Path(__file__).parent), *paths]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert said.stdout.strip() == str(first)


def test_sources_are_drawn_in_proportion_to_their_weights(two: list[StreamSource]) -> None:
    counts = Counter(label for label, _ in take(stream(*two).training(), 4000))
    # Binomial with p = 3/4: the standard deviation is 27; five of them are passed once in two million.
    assert abs(counts["a.jsonl"] - 3000) < 137
    assert stream(*two).probabilities == [0.75, 0.25]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_processes_and_workers_share_the_stream_batch_by_batch(
    two: list[StreamSource], world_size: int, num_workers: int
) -> None:
    """A data loader takes batches from its workers in turn; all processes' k-th batches are the k-th global batch."""
    batch_size, steps = 2, 7
    everything = take(stream(*two).training(), steps * batch_size * world_size)
    for rank in range(world_size):
        workers = [
            shard(
                stream(*two).training(),
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                worker=worker,
                num_workers=num_workers,
            )
            for worker in range(num_workers)
        ]
        batches = [take(workers[step % num_workers], batch_size) for step in range(steps)]
        assert [item for batch in batches for item in batch] == everything[rank::world_size]


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_a_restart_at_a_position_goes_on_exactly(two: list[StreamSource], fraction: float) -> None:
    draws = list(itertools.islice(stream(*two, fraction=fraction).training(), 90))
    for number in (1, 17, 60):
        again = stream(*two, fraction=fraction).training(draws[number - 1].position + 1)
        assert take(again, 90 - number) == [(draw.source.label, draw.index) for draw in draws[number:]]


def test_passing_over_records_parses_none_of_them(two: list[StreamSource], monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    original = Draw.sample

    def sample(self: Draw) -> Sample:
        parsed.append(self.position)
        return original(self)

    monkeypatch.setattr(Draw, "sample", sample)
    next(stream(*two, fraction=0.1).training(70))
    assert min(parsed) == 70


def test_an_image_is_held_out_with_all_its_records_or_not_at_all(tmp_path: Path) -> None:
    records = [record(i, image=f"{i % 50}.png") for i in range(200)]
    records += [record(200 + i, image=[f"{i}.png", f"{i + 1}.png"]) for i in range(49)]
    for entry in records[200:]:
        entry["conversations"] = [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "."}]
    path = write(tmp_path / "a.jsonl", records)
    sides: dict[str, set[str]] = {"training": set(), "validation": set(), "neither": set()}
    mixture = stream(source(path), fraction=0.3)
    for draw in itertools.islice(mixture.everything(), len(records)):
        sides[mixture.side(draw)] |= {ref.name for ref in draw.sample().images}
    assert sides["training"]
    assert not sides["training"] & sides["validation"]
    assert sides["neither"] <= sides["training"] | sides["validation"]
    # Binomial with 50 images and p = 0.3: five standard deviations are 16.
    assert abs(len(sides["validation"]) - 15) <= 16


def test_a_skip_list_and_blank_lines_do_not_shift_the_indices(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [record(0), "", record(1), record(2)])
    found = take(stream(source(path, left_out=frozenset({1})), buffer=1).training(), 4)
    assert [index for _, index in found] == [0, 2, 0, 2]


def test_a_faulty_record_is_named_and_the_others_are_not_disturbed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [record(0), "{", record(2)])
    draws = list(itertools.islice(stream(source(path), buffer=1, fraction=0.01).training(), 3))
    with pytest.raises(InputError, match=r"a\.jsonl: record 1: is not valid JSON"):
        draws[1].sample()
    assert draws[2].sample().id == "r2"


def test_a_stream_of_nothing_is_an_error_and_not_an_endless_loop(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no records"):
        next(stream(source(write(tmp_path / "a.jsonl", ["", ""]))).training())
    path = write(tmp_path / "b.jsonl", [record(i) for i in range(3)])
    with pytest.raises(InputError, match="holds no records"):
        next(stream(source(path, left_out=frozenset(range(3)))).training())
    with pytest.raises(InputError, match="holds no record to train on"):
        next(stream(source(path), fraction=0.999999).training())


# Files of every kind.


def png(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (colour, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def parquet(path: Path, start: int, number: int) -> Path:
    from datasets import Dataset

    rows = [
        {"image": {"bytes": png(i), "path": None}, "question": f"q{i}", "answer": f"a{i}"}
        for i in range(start, start + number)
    ]
    Dataset.from_list(rows).to_parquet(path)
    return path


def a_parquet_file(folder: Path) -> Path:
    return parquet(folder / "data [v1].parquet", 0, 20)


def a_folder_of_parquet_files(folder: Path) -> Path:
    (folder / "tables").mkdir()
    parquet(folder / "tables" / "0.parquet", 0, 12)
    parquet(folder / "tables" / "1.parquet", 12, 8)
    return folder / "tables"


def a_saved_data_set(folder: Path) -> Path:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    rows = [{"image": {"bytes": png(i), "path": None}, "question": f"q{i}", "answer": f"a{i}"} for i in range(20)]
    features = Features({"image": ImageFeature(), "question": Value("string"), "answer": Value("string")})
    Dataset.from_list(rows, features=features).save_to_disk(folder / "saved")
    return folder / "saved"


def a_tar(folder: Path) -> Path:
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for i in range(20):
            content = json.dumps({"question": f"q{i}", "answer": f"a{i}"}).encode()
            for name, data in ((f"dir/{i}.png", png(i)), (f"dir/{i}.json", content)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return folder / "shard.tar"


def a_json_lines_file_with_pictures_inside(folder: Path) -> Path:
    return write(
        folder / "inside.jsonl",
        [
            {
                "image": f"data:image/png;base64,{base64.b64encode(png(i)).decode()}",
                "question": f"q{i}",
                "answer": f"a{i}",
            }
            for i in range(20)
        ],
    )


KINDS = [
    a_parquet_file,
    a_folder_of_parquet_files,
    a_saved_data_set,
    a_tar,
    a_json_lines_file_with_pictures_inside,
]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_every_kind_of_file_streams_in_order_with_its_pictures(tmp_path: Path, make: Any) -> None:
    mixture = stream(source(make(tmp_path)), buffer=1)
    found = [draw.sample() for draw in itertools.islice(mixture.training(), 25)]
    for number, sample in enumerate(found):
        assert sample.messages[1].text == f"a{number % 20}"
        assert image_bytes(sample.images[0]) == png(number % 20)


def test_workers_of_a_data_loader_read_all_parquet_files(tmp_path: Path) -> None:
    """datasets by itself would give each worker only some of the files."""
    from torch.utils.data import DataLoader, IterableDataset

    class Indices(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return (draw.index for draw in itertools.islice(mixture.training(), 20))

    mixture = stream(source(a_folder_of_parquet_files(tmp_path)), buffer=1)
    found = [int(item) for item in DataLoader(Indices(), batch_size=None, num_workers=2)]
    assert sorted(found) == sorted([*range(20), *range(20)])


def test_captions_beside_pictures_in_a_tar_are_answers(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in (("7.jpg", png(7)), ("7.txt", b"a red square"), ("7.json", b'{"url": "x"}')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    sample = next(stream(source(tmp_path / "a.tar")).training()).sample()
    assert (sample.id, sample.messages[1].text, len(sample.images)) == ("7", "a red square", 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[]", "A .json list is read as a whole"),
        ("a.csv", "", "cannot be streamed"),
        ("no/such.jsonl", None, "does not exist"),
    ],
)
def test_what_cannot_be_streamed_is_refused_with_the_way_out(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        open_raw_stream(StreamFile(path=str(tmp_path / name)))


def test_a_hub_id_that_cannot_be_reached_is_one_clear_error() -> None:
    """The suite runs with the hub switched off."""
    with pytest.raises(InputError, match="nobody/nothing: cannot be opened as a Hugging Face data set") as error:
        open_raw_stream(StreamFile(path="nobody/nothing"))
    assert "\n" not in str(error.value)


def test_a_file_that_changes_has_another_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [record(0), record(1)])
    before = open_raw_stream(StreamFile(path=str(path))).fingerprint
    write(path, [record(0), record(2)])
    assert open_raw_stream(StreamFile(path=str(path))).fingerprint != before


MEMORY = """
import itertools, sys
from pathlib import Path
from symphony_vlm.data.stream_readers import StreamFile, open_raw_stream
from symphony_vlm.data.streaming import RecordStream, StreamSource
raw = open_raw_stream(StreamFile(path=sys.argv[1]))
one = StreamSource(label="a", raw=raw, image_folder=Path())
stream = RecordStream([one], seed=0, shuffle_buffer=1000, validation_fraction=0.02)
print(sum(1 for draw in itertools.islice(stream.everything(), 1_000_000) if stream.side(draw) == "training"))
# Not ru_maxrss: a child starts with its parent's, and the parent here is a whole test session.
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
def test_a_million_records_stream_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "million.jsonl"
    with path.open("w") as file:
        for number in range(1_000_000):
            file.write(json.dumps(record(number, image=f"{number % 50_000}.png")) + "\n")
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True)
    num_training, megabytes = done.stdout.split()
    assert 970_000 < int(num_training) < 990_000
    assert float(megabytes) < 500
