"""Write one data file as two that share no image: one to train on, one to hold out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symphony_vlm.data.datasets import SampleSource
from symphony_vlm.data.images import image_bytes, image_key
from symphony_vlm.data.sample import ImageRef
from symphony_vlm.data.split import split_by_image
from symphony_vlm.errors import InputError
from symphony_vlm.files import replacing_folder

__all__ = ["HeldOut", "write_held_out"]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Two files, and how many records of each source they have."""

    train: Path
    test: Path
    train_records: dict[str, int]
    """By the records' field ``source``; one entry, ``""``, where none has it."""
    test_records: dict[str, int]


def write_held_out(source: SampleSource, output: Path, *, fraction: float, seed: int) -> HeldOut:
    """Write ``train`` and ``test`` in the format of the source, records as they are and in their order.

    The division is that of `split_by_image`, where images of the same bytes are one. Image paths stay relative to the
    source's image folder.

    Args:
        source: of a ``.json`` or ``.jsonl`` file.
        output: a folder that does not exist yet.
        fraction: share of the records to hold out, above 0 and below 1.
        seed: another seed holds out other images.

    Raises:
        InputError: another format, a folder that exists, a malformed record, a missing image, or only one.
    """
    suffix = source.path.suffix
    if suffix not in (".json", ".jsonl"):
        raise InputError(
            "is divided by its own splits; only .json and .jsonl files are written",
            where=str(source.path),
            remedy="Name its splits in the recipe (split: train), or hold out data.validation_fraction in training.",
        )
    if output.exists():
        raise InputError("exists already", where=f"output {str(output)!r}", remedy="Name a new folder.")
    if not 0 < fraction < 1:
        raise InputError(f"is {fraction}; it must be above 0 and below 1", where="fraction")
    train, test = split_by_image(source, range(len(source)), fraction=fraction, seed=seed, key=_content_keys())
    if not test:
        raise InputError("all records share one image, so none can be held out", where=str(source.path))
    parts = {"train": train, "test": test}
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(output) as folder:
        folder.mkdir()
        counts = {name: _write(folder / f"{name}{suffix}", source, part) for name, part in parts.items()}
    return HeldOut(
        train=output / f"train{suffix}",
        test=output / f"test{suffix}",
        train_records=counts["train"],
        test_records=counts["test"],
    )


def _content_keys() -> Callable[[ImageRef], str]:
    """The hash of an image's bytes; each file is read once."""
    found: dict[str, str] = {}

    def key(ref: ImageRef) -> str:
        name = image_key(ref)
        if name not in found:
            found[name] = hashlib.sha256(image_bytes(ref)).hexdigest()
        return found[name]

    return key


def _write(path: Path, source: SampleSource, indices: Sequence[int]) -> dict[str, int]:
    counts: Counter[str] = Counter()

    def records() -> Iterator[str]:
        for index in indices:
            record: dict[str, Any] = source.record(index)
            counts[str(record.get("source", ""))] += 1
            yield json.dumps(record, ensure_ascii=False)

    before, between, after = ("[\n", ",\n", "\n]\n") if path.suffix == ".json" else ("", "\n", "\n")
    with path.open("w", encoding="utf-8") as file:
        file.write(before)
        for number, text in enumerate(records()):
            file.write(f"{between if number else ''}{text}")
        file.write(after)
    return dict(sorted(counts.items()))
