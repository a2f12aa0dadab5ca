"""The data of a run: opened, checked record by record, and split into training and validation once for all stages."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from symphony_vlm.config.recipe import Recipe, StageConfig
from symphony_vlm.data.datasets import SampleSource, open_samples
from symphony_vlm.data.images import image_bytes, image_key
from symphony_vlm.data.mixture import MixturePart, SampleList, WithoutRecords, repeated
from symphony_vlm.data.preflight import check_samples
from symphony_vlm.data.sample import ImagePart, ImageRef, Sample, TextPart
from symphony_vlm.data.skip_list import check_range
from symphony_vlm.data.split import split_by_image
from symphony_vlm.data.streaming import RecordStream
from symphony_vlm.data.turns import IMAGE_MARKER
from symphony_vlm.errors import InputError
from symphony_vlm.files import write_text
from symphony_vlm.training.sources import NamedSource, listed_records, used_sources
from symphony_vlm.training.text_data import TextData, open_text_data

__all__ = ["RunData", "open_run_data"]

Report = Callable[[str], None]
MAX_VALIDATION_RECORDS = 2000
"""More than this adds little to the precision of a loss and a lot to its time."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Training and validation samples by the role they play (``train``, ``captions``)."""

    train: dict[str, SampleList]
    """When streaming: the first records only, for a new tokenizer to learn from."""
    validation: dict[str, SampleList]
    fingerprints: dict[str, str]
    """sha256 of each data file and skip list; of a stream see `data.stream_readers`."""
    counts: dict[str, dict[str, Any]]
    """By role and source: records, those listed in ``data.skip``, images, faults, training and validation records, the
    weight, and training records per epoch; of a stream, which nobody has counted, its probability."""
    streams: dict[str, RecordStream] = field(default_factory=dict)
    """By role, when streaming."""
    text: TextData | None = None
    """Of language stages, which have nothing else."""

    def get(self, stage: StageConfig) -> tuple[SampleList, SampleList]:
        """(training, validation) samples for a stage."""
        train = [self.train[role] for role in stage.roles]
        validation = [self.validation[role] for role in stage.roles]
        return SampleList.join(train), SampleList.join(validation)

    def stream(self, stage: StageConfig) -> RecordStream:
        """All the stage's sources as one stream."""
        return RecordStream.join([self.streams[role] for role in stage.roles])


def open_run_data(recipe: Recipe, output: Path, report: Report) -> RunData:
    """Opens every source that the recipe's stages use, draws scenes if it asks for them, checks and splits.

    Args:
        recipe: its `data` and the stages' roles.
        output: the run's folder; scenes and ``validation.jsonl`` are written there.
        report: gets one line per source.

    Raises:
        InputError: a stage's data is not set, or a file or record cannot be used.
    """
    if recipe.is_language:
        text = open_text_data(recipe, report)
        return RunData(train={}, validation={}, fingerprints=text.fingerprints, counts={}, text=text)
    sources = used_sources(recipe, output, report)
    left_out = listed_records(recipe, sources)
    if recipe.data.streaming:
        from symphony_vlm.training.stream_data import open_stream_data

        data = open_stream_data(recipe, sources, left_out, report)
    else:
        data = _open_files(recipe, sources, left_out, report)
    if "train" in data.validation and recipe.data.scenes is None:
        _write_validation(data.validation["train"], output)
    return data


def _open_files(
    recipe: Recipe, sources: dict[str, list[NamedSource]], left_out: dict[str, set[int]], report: Report
) -> RunData:
    opened = {
        role: [_open_source(source, left_out[source.label], recipe, report) for source in sources[role]]
        for role in sources
    }
    _keep_held_out([part for parts in opened.values() for part in parts], report)
    train: dict[str, SampleList] = {}
    validation: dict[str, SampleList] = {}
    fingerprints = {path: _sha256_of(path) for path in recipe.data.skip}
    counts: dict[str, dict[str, Any]] = {}
    for role, parts in opened.items():
        train[role] = SampleList([part.chosen(part.epoch(recipe.seed)) for part in parts])
        validation[role] = SampleList([part.chosen(part.validation) for part in parts])
        for part in parts:
            fingerprints[part.label] = part.source.fingerprint
            counts[f"{role}: {part.label}"] = part.counts | {
                "train": len(part.train),
                "validation": len(part.validation),
                "weight": part.weight,
                "per_epoch": len(part.epoch(recipe.seed)),
            }
    _report_mixture(counts, report)
    return RunData(train=train, validation=validation, fingerprints=fingerprints, counts=counts)


@dataclass(frozen=True, kw_only=True)
class _Part:
    label: str
    source: SampleSource
    weight: float
    train: list[int]
    validation: list[int]
    counts: dict[str, Any]

    def epoch(self, seed: int) -> list[int]:
        """The records that an epoch sees, each as often as it does."""
        return repeated(self.train, self.weight, seed=seed, label=self.label)

    def chosen(self, indices: list[int]) -> MixturePart:
        return MixturePart(label=self.label, source=self.source, indices=indices)


def _keep_held_out(parts: Sequence[_Part], report: Report) -> None:
    """A picture that one file holds out must not be trained on through another file or in another stage."""
    if len(parts) < 2:
        return
    held = {image_key(ref) for part in parts for index in part.validation for ref in part.source[index].images}
    for part in parts:
        kept = [index for index in part.train if not any(image_key(ref) in held for ref in part.source[index].images)]
        if len(kept) < len(part.train):
            report(f"{part.label}: {len(part.train) - len(kept)} more left out, held out in another file")
            part.train[:] = kept


def _open_source(named: NamedSource, left_out: set[int], recipe: Recipe, report: Report) -> _Part:
    data = recipe.data
    given = {key: value for key in ("split", "subset") if (value := getattr(named.source, key)) is not None}
    source = open_samples(Path(named.source.path).expanduser(), image_folder=named.image_folder, **given)
    check_range(left_out, len(source), named.label)
    view = WithoutRecords(source, left_out)
    if not len(view):
        raise InputError("every record is listed in data.skip; none is left to train on", where=named.label)
    checked = check_samples(
        view if left_out else source,
        on_bad_sample=data.on_bad_sample,
        decode_images=data.check_images,
        max_pixels=data.max_pixels,
    )
    usable = [view.indices[index] for index in checked.usable]
    train, validation = split_by_image(source, usable, fraction=data.validation_fraction, seed=recipe.seed)
    validation = validation[:MAX_VALIDATION_RECORDS]
    counts = {
        "records": len(source),
        "listed": len(left_out),
        "images": checked.n_images,
        "faults": len(checked.faults),
    }
    listed = f"{len(left_out)} listed in data.skip, " if left_out else ""
    report(
        f"{named.label}: {len(source)} records, {listed}{checked.n_images} images, {len(checked.faults)} faults; "
        f"{len(train)} to train on, {len(validation)} held out"
    )
    for fault in checked.faults[:5]:
        report(f"  left out: {fault.reason}")
    return _Part(
        label=named.label,
        source=source,
        weight=named.source.weight,
        train=train,
        validation=validation,
        counts=counts,
    )


def _report_mixture(counts: dict[str, dict[str, Any]], report: Report) -> None:
    """What an epoch is made of, where that is not just every record once."""
    if all(count["weight"] == 1 for count in counts.values()):
        return
    for name, count in counts.items():
        report(f"{name}: weight {count['weight']:g}, {count['per_epoch']} of {count['train']} records an epoch")


def _write_validation(samples: SampleList, output: Path) -> None:
    """The held-out records as LLaVA JSON lines, ready for ``symphony-vlm eval --data RUN/validation.jsonl``."""
    lines = []
    seen: Counter[str] = Counter()
    for sample in samples:
        # Files without ids number their records, each from 0.
        seen[sample.id] += 1
        unique = sample.id if seen[sample.id] == 1 else f"{sample.id} ({seen[sample.id]})"
        record: dict[str, Any] = {"id": unique, **{k: v for k, v in sample.meta.items() if _is_plain(v)}}
        if sample.images:
            images = [_image_path(ref, output) for ref in sample.images]
            record["image"] = images[0] if len(images) == 1 else images
        record |= _turns(sample)
        lines.append(json.dumps(record, ensure_ascii=False))
    write_text(output / "validation.jsonl", "\n".join(lines) + "\n" if lines else "")


def _turns(sample: Sample) -> dict[str, Any]:
    """The conversation in LLaVA's form, or as messages with parts if a question has the word ``<image>`` in it."""
    texts = [part.text for m in sample.messages if m.role == "user" for part in m.parts if isinstance(part, TextPart)]
    if any(IMAGE_MARKER in text for text in texts):
        return {"messages": [{"role": m.role, "content": [_part(p) for p in m.parts]} for m in sample.messages]}
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {
        "conversations": [
            {
                "from": names[message.role],
                "value": "".join(IMAGE_MARKER if isinstance(p, ImagePart) else p.text for p in message.parts),
            }
            for message in sample.messages
        ]
    }


def _part(part: TextPart | ImagePart) -> dict[str, Any]:
    return {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image", "index": part.index}


def _image_path(ref: ImageRef, output: Path) -> str:
    if ref.path is not None:
        return str(ref.path.resolve())
    data = image_bytes(ref)
    path = output / "validation_images" / f"{hashlib.sha256(data).hexdigest()[:24]}.img"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(path.relative_to(output))


def _sha256_of(path: str) -> str:
    return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()


def _is_plain(value: object) -> bool:
    return isinstance(value, (str, int, float, bool, list))
