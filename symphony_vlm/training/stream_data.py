"""The data of a run that streams: sources opened, and a few records read to validate on and to learn a tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symphony_vlm.config.recipe import DataConfig, Recipe
from symphony_vlm.data.images import load_image
from symphony_vlm.data.mixture import MixturePart, SampleList
from symphony_vlm.data.sample import Sample
from symphony_vlm.data.stream_readers import StreamFile, open_raw_stream
from symphony_vlm.data.streaming import SKIP_REMEDY, Draw, RecordStream, StreamSource
from symphony_vlm.errors import InputError
from symphony_vlm.training.sources import NamedSource

if TYPE_CHECKING:
    from symphony_vlm.training.run_data import RunData

__all__ = ["open_stream_data"]

TOKENIZER_RECORDS = 10_000
"""The first training records of each role, from which a new language model's tokenizer is trained."""
VALIDATION_RECORDS = 128
"""Held-out records of each role, with their images: kept in memory, and looked for before training starts."""
LOOKED_AT = 20_000
"""Records of each role that are read for both at most."""


def open_stream_data(
    recipe: Recipe,
    sources: dict[str, list[NamedSource]],
    left_out: dict[str, set[int]],
    report: Callable[[str], None],
) -> RunData:
    """Opens every source and reads the first records.

    Args:
        recipe: its `data` and seed.
        sources: by role.
        left_out: indices of the records that ``data.skip`` lists, by label.
        report: gets a few lines for each role.

    Raises:
        InputError: a source cannot be opened, or the first records hold nothing to train on.
    """
    from symphony_vlm.training.run_data import RunData

    data = recipe.data
    streams: dict[str, RecordStream] = {}
    train: dict[str, SampleList] = {}
    validation: dict[str, SampleList] = {}
    fingerprints = {path: hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest() for path in data.skip}
    counts: dict[str, dict[str, Any]] = {}
    needs_text = recipe.model.language.name is None and recipe.model.start is None
    for role, named in sources.items():
        opened = [_open(source, left_out[source.label]) for source in named]
        fingerprints |= {source.label: source.raw.fingerprint for source in opened}
        stream = streams[role] = RecordStream(
            opened,
            seed=recipe.seed,
            shuffle_buffer=data.shuffle_buffer,
            validation_fraction=data.validation_fraction,
        )
        for source, probability in zip(opened, stream.probabilities, strict=True):
            counts[f"{role}: {source.label}"] = {
                "listed": len(source.left_out),
                "weight": source.weight,
                "probability": round(probability, 6),
            }
            report(f"{source.label}: streamed, {probability:.1%} of the records of data.{role}; {_listed(source)}")
        first, held = _first_records(stream, needs_text, data, report)
        train[role], validation[role] = _in_memory(role, first), _in_memory(role, held)
        report(f"data.{role}: {len(held)} held-out records found for the validation loss")
    report("streamed data is not checked before training: `symphony-vlm data check` does that, and data.skip takes it")
    return RunData(train=train, validation=validation, fingerprints=fingerprints, counts=counts, streams=streams)


def _open(named: NamedSource, left_out: set[int]) -> StreamSource:
    source = named.source
    path = Path(source.path).expanduser()
    if named.image_folder is not None and not named.image_folder.is_dir():
        raise InputError("is not a folder", where=f"image folder {str(named.image_folder)!r}")
    return StreamSource(
        label=named.label,
        raw=open_raw_stream(StreamFile(path=source.path, split=source.split, subset=source.subset)),
        image_folder=named.image_folder or (path if path.is_dir() else path.parent),
        weight=source.weight,
        left_out=frozenset(left_out),
    )


def _listed(source: StreamSource) -> str:
    return f"{len(source.left_out)} records listed in data.skip are left out" if source.left_out else "not counted"


def _first_records(
    stream: RecordStream, needs_text: bool, data: DataConfig, report: Callable[[str], None]
) -> tuple[list[Sample], list[Sample]]:
    """Training records without their images, and held-out ones with them."""
    num_first = TOKENIZER_RECORDS if needs_text else 1
    num_held = VALIDATION_RECORDS if stream.holds_out else 0
    first: list[Sample] = []
    held: list[Sample] = []
    for draw in stream.everything():
        if draw.position >= LOOKED_AT or draw.rounds or (len(first) >= num_first and len(held) >= num_held):
            break
        side = stream.side(draw)
        if side == "training" and len(first) < num_first:
            if (sample := _usable(draw, data, report, images=False)) is not None:
                first.append(replace(sample, images=()))
        elif (
            side == "validation"
            and len(held) < num_held
            and (sample := _usable(draw, data, report, images=True)) is not None
        ):
            held.append(sample)
    if not first:
        raise InputError("the first records hold none to train on", where=", ".join(stream.labels))
    return first, held


def _usable(draw: Draw, data: DataConfig, report: Callable[[str], None], *, images: bool) -> Sample | None:
    try:
        sample = draw.sample()
        for ref in sample.images if images else ():
            load_image(ref, max_pixels=data.max_pixels)
    except InputError as error:
        if data.on_bad_sample == "error":
            raise InputError(str(error), remedy=SKIP_REMEDY) from error
        report(f"  left out: {error}")
        return None
    return sample


def _in_memory(role: str, samples: Sequence[Sample]) -> SampleList:
    return SampleList([MixturePart(label=role, source=samples, indices=range(len(samples)))])
