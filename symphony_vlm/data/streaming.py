"""An endless stream of training records from sources that are read while training.

The order is a function of the seed and the data alone. Each source is read from its beginning, shuffled in a buffer,
and begun again, with another shuffle, when it ends; the next record comes from a source drawn in proportion to the
weights. Records of a skip list are passed over; the others are numbered, which is their `Draw.position`. Held-out ones
are passed over by `RecordStream.training`. Every process and every worker walks through the whole stream, parses each
record (to see whether it is held out) and keeps those whose turn it is. A restart walks to the position where it
stopped, where records are read and nothing else: not parsed, no image opened, nothing tokenised.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from symphony_vlm.data.records import sample_from_record
from symphony_vlm.data.sample import Sample
from symphony_vlm.data.split import portable_name
from symphony_vlm.data.stream_readers import RawStream
from symphony_vlm.errors import InputError

__all__ = ["SKIP_REMEDY", "Draw", "RecordStream", "StreamSource", "shard"]

SKIP_REMEDY = "Correct it, or go on without such records with on_bad_sample: skip."
Side = Literal["training", "validation", "neither"]


@dataclass(frozen=True, kw_only=True)
class StreamSource:
    """One source of a stream."""

    label: str
    """How logs name it."""
    raw: RawStream
    image_folder: Path
    """What relative image paths are relative to."""
    weight: float = 1.0
    left_out: frozenset[int] = frozenset()
    """Indices of records to pass over."""


@dataclass(kw_only=True)
class Draw:
    """One record at its place in the stream, parsed when asked for."""

    source: StreamSource
    number: int
    """Of the source, in the stream's list."""
    index: int
    """Of the record in its source."""
    rounds: int
    """How often the source had been read to its end before."""
    raw: Any
    position: int = -1
    """In the whole stream, held-out records included."""
    _sample: Sample | None = field(default=None, repr=False)

    @property
    def where(self) -> str:
        """How messages name the record."""
        return f"{self.source.label}: {self.source.raw.place(self.index)}"

    @property
    def record_id(self) -> str:
        """Its id, or its index if it has none or could not be read."""
        return str(self.index) if self._sample is None else self._sample.id

    def sample(self) -> Sample:
        """The record as a sample; no image is opened.

        Raises:
            InputError: it is not valid; names source, record, field and remedy.
        """
        if self._sample is None:
            try:
                record = self.source.raw.record(self.raw)
            except InputError as error:
                raise InputError(error.problem, where=self.where, remedy=error.remedy) from error
            self._sample = sample_from_record(
                record,
                where=self.where,
                index=self.index,
                image_folder=self.source.image_folder,
            )
        return self._sample


class RecordStream:
    """The records of several sources in one endless, reproducible order.

    Args:
        sources: at least one.
        seed: of the order and the validation share.
        shuffle_buffer: records of each source among which the next is drawn; 1 keeps their order.
        validation_fraction: share of the images (of the ids, for records without one) held out.
    """

    def __init__(
        self, sources: Sequence[StreamSource], *, seed: int, shuffle_buffer: int, validation_fraction: float
    ) -> None:
        self.sources = tuple(sources)
        self._seed = seed
        self._buffer = shuffle_buffer
        self._fraction = validation_fraction

    @classmethod
    def join(cls, streams: Sequence[RecordStream]) -> RecordStream:
        """The sources of several streams of the same settings as one stream."""
        first = streams[0]
        return cls(
            [source for stream in streams for source in stream.sources],
            seed=first._seed,
            shuffle_buffer=first._buffer,
            validation_fraction=first._fraction,
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """The sources by name."""
        return tuple(source.label for source in self.sources)

    @property
    def holds_out(self) -> bool:
        """Whether there is a validation share."""
        return self._fraction > 0

    @property
    def probabilities(self) -> list[float]:
        """How likely the next record is from each source."""
        total = sum(source.weight for source in self.sources)
        return [source.weight / total for source in self.sources]

    def training(self, start: int = 0) -> Iterator[Draw]:
        """The records to train on, without end; the n-th is the same in every process.

        Args:
            start: the position of the first record to look at.

        Raises:
            InputError: a source cannot be read, or was read to its end twice without any record to train on.
        """
        last_used = [-1] * len(self.sources)
        for draw in itertools.islice(self.everything(), start, None):
            if last_used[draw.number] < 0:
                last_used[draw.number] = draw.rounds
            if draw.rounds > last_used[draw.number] + 1:
                raise InputError("holds no record to train on", where=draw.source.label)
            if self._fraction == 0 or self.side(draw) == "training":
                last_used[draw.number] = draw.rounds
                yield draw

    def everything(self) -> Iterator[Draw]:
        """All records, held-out ones too, without end."""
        for position, draw in enumerate(self._mixed()):
            draw.position = position
            yield draw

    def _mixed(self) -> Iterator[Draw]:
        streams = [self._endless(number, source) for number, source in enumerate(self.sources)]
        if len(streams) == 1:
            yield from streams[0]
        # A string seeds by its SHA-512: the same in every process and Python version.
        rng = random.Random(f"mix:{self._seed}")
        weights = list(itertools.accumulate(self.probabilities))
        while True:
            yield next(rng.choices(streams, cum_weights=weights)[0])

    def side(self, draw: Draw) -> Side:
        """Whether a record is trained on, held out, or neither (some of its images are held out and others not).

        A record that cannot be read is left to training, which names it.
        """
        try:
            sample = draw.sample()
        except InputError:
            return "training"
        names = {portable_name(ref) for ref in sample.images} or {f"id:{sample.id}"}
        held = [_share(f"{self._seed}:{name}") < self._fraction for name in names]
        return "validation" if all(held) else "neither" if any(held) else "training"

    def _endless(self, number: int, source: StreamSource) -> Iterator[Draw]:
        for rounds in itertools.count():
            empty = True
            for index, raw in self._shuffled(source, rounds):
                empty = False
                yield Draw(source=source, number=number, index=index, rounds=rounds, raw=raw)
            if empty:
                raise InputError("holds no records", where=source.label, remedy="Check that the right file was given.")

    def _shuffled(self, source: StreamSource, rounds: int) -> Iterator[tuple[int, Any]]:
        rng = random.Random(f"shuffle:{self._seed}:{source.label}:{rounds}")
        buffer: list[tuple[int, Any]] = []
        for item in enumerate(source.raw):
            if item[0] in source.left_out:
                continue
            if len(buffer) < self._buffer:
                buffer.append(item)
                continue
            place = rng.randrange(self._buffer)
            yield buffer[place]
            buffer[place] = item
        if self._buffer > 1:
            rng.shuffle(buffer)
        yield from buffer


def shard(
    draws: Iterator[Draw],
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    worker: int = 0,
    num_workers: int = 1,
) -> Iterator[Draw]:
    """The draws of one data-loader worker of one process.

    Process r has the draws r, r + world_size, ...; its batches go to its workers in turn. A data loader takes batches
    from its workers in the same turn, so what a process gets does not depend on how many it has.

    Args:
        draws: all draws from the beginning of a batch.
        batch_size: per process.
        rank: of the process.
        world_size: number of processes.
        worker: of the process.
        num_workers: of each process.
    """
    for place, draw in enumerate(draws):
        batch = place // world_size // batch_size
        if place % world_size == rank and batch % num_workers == worker:
            yield draw


def _share(name: str) -> float:
    """A number from 0 to below 1 that looks random and is always the same for a name."""
    return int.from_bytes(hashlib.sha256(f"holdout:{name}".encode()).digest()[:8], "big") / 2**64
