"""The data set of a stage that streams: items in the stream's order, each process and worker with its own share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from accelerate import PartialState
from torch.utils.data import IterableDataset, get_worker_info

from symphony_vlm.data.augmentation import Augmentation
from symphony_vlm.data.mixture import MixturePart, SampleList
from symphony_vlm.data.placeholders import placeholder_like
from symphony_vlm.data.sample import Message, Sample, TextPart
from symphony_vlm.data.streaming import Draw, RecordStream, shard
from symphony_vlm.errors import InputError

__all__ = ["StreamedConversations", "streamed"]

_EXAMPLE = Sample(
    id="",
    origin="",
    messages=(
        Message(role="user", parts=(TextPart(text="?"),)),
        Message(role="assistant", parts=(TextPart(text="!"),)),
    ),
)


class StreamedConversations(IterableDataset[Any]):
    """Endless items of a stream.

    A record that cannot be used becomes a placeholder with its reason in the field ``fault``, so that the records
    after it keep their places; whether to stop is for the main process to say (`consumption.Consumption`).

    Args:
        stream: the records.
        prepare: makes an item of a sample, or raises InputError.
        batch_size: per process.
        rank: of this process.
        world_size: number of processes.
        pad_token_id: what a placeholder consists of.
        augmentation: of the pictures; it is told how often a draw's source had been read to its end before.
    """

    def __init__(
        self,
        stream: RecordStream,
        *,
        prepare: Callable[[Sample], Any],
        batch_size: int,
        rank: int,
        world_size: int,
        pad_token_id: int,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.stream = stream
        self.start = 0
        """The stream's position to begin at; a continued run sets it."""
        self._prepare = prepare
        self._batch_size = batch_size
        self._rank = rank
        self._augmentation = augmentation
        self._world_size = world_size
        # Of an item, so that it has the fields that the collator expects.
        self._placeholder = placeholder_like(prepare(_EXAMPLE), pad_token_id)

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        draws = shard(
            self.stream.training(self.start),
            batch_size=self._batch_size,
            rank=self._rank,
            world_size=self._world_size,
            worker=info.id if info else 0,
            num_workers=info.num_workers if info else 1,
        )
        return map(self._item, draws)

    def _item(self, draw: Draw) -> Any:
        if self._augmentation is not None:
            self._augmentation.set_epoch(draw.rounds)
        try:
            item = {**self._prepare(draw.sample()), "sources": [draw.number]}
        except InputError as error:
            reason = str(error) if draw.where in str(error) else f"{draw.where}: {error}"
            fault = {"file": draw.source.label, "index": draw.index, "id": draw.record_id, "reason": reason}
            item = {**self._placeholder, "fault": fault}
        return {**item, "position": draw.position}


def streamed(
    stream: RecordStream,
    dataset: Callable[[SampleList], Any],
    *,
    batch_size: int,
    pad_token_id: int,
    augmentation: Augmentation | None = None,
) -> StreamedConversations:
    """This process's share of a stream.

    Args:
        stream: the records.
        dataset: makes a data set of samples; each record of the stream is prepared as the only item of one.
        batch_size: per process.
        pad_token_id: what a placeholder consists of.
        augmentation: what ``dataset`` does to pictures.
    """
    return StreamedConversations(
        stream,
        prepare=partial(_prepare, dataset),
        batch_size=batch_size,
        rank=PartialState().process_index,
        world_size=PartialState().num_processes,
        pad_token_id=pad_token_id,
        augmentation=augmentation,
    )


def _prepare(dataset: Callable[[SampleList], Any], sample: Sample) -> Any:
    return dataset(SampleList([MixturePart(label="", source=[sample], indices=[0])]))[0]
