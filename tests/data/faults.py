"""Seeds faults of known kinds into a copy of clean LLaVA data, to see whether a check finds them all.

`inject` returns which record was hit with what. Records share images, so a record whose image is to be broken gets a
copy of its own first; no other record is touched.
"""

from __future__ import annotations

import base64
import io
import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SeededFault:
    """One record that was hit."""

    index: int
    id: str
    """What a report should call it: its id, or its index where the fault took the id away."""
    name: str
    """One of `FAULTS`."""
    kind: str
    """The kind that ``data check`` should report."""


@dataclass(frozen=True, kw_only=True)
class Seeded:
    """The broken copy."""

    data: Path
    image_folder: Path
    faults: tuple[SeededFault, ...]


@dataclass
class _Hit:
    """What a fault may use and change."""

    record: Record
    image: Path
    """A file of the record's own, not yet written."""
    original: Path
    """The record's clean image."""
    earlier: Record
    """A clean record that comes before this one and that nothing else refers to."""
    rng: random.Random

    def turn(self, role: str) -> Record:
        found: Record = next(turn for turn in self.record["conversations"] if turn["from"] == role)
        return found


def _encoded(hit: _Hit, form: str) -> bytes:
    buffer = io.BytesIO()
    with Image.open(hit.original) as image:
        image.convert("RGB").save(buffer, form)
    return buffer.getvalue()


def _write_half(hit: _Hit, form: str) -> None:
    data = _encoded(hit, form)
    hit.image.write_bytes(data[: len(data) // 2])


def _write_oversized_bytes(hit: _Hit) -> None:
    hit.image.write_bytes(_encoded(hit, "PNG"))
    with hit.image.open("r+b") as file:
        file.truncate(100_000_001)  # a hole: no disk is used


def _write_float_tiff(hit: _Hit) -> None:
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(hit.image, "TIFF")


def _write_many_pixels(hit: _Hit) -> None:
    Image.new("1", (10_000, 9_000)).save(hit.image, "PNG")


def _too_few_markers(hit: _Hit) -> None:
    names = hit.record["image"]
    hit.record["image"] = [*(names if isinstance(names, list) else [names]), hit.earlier["image"]]


def _broken_base64(hit: _Hit) -> None:
    text = base64.b64encode(_encoded(hit, "JPEG")).decode()
    hit.record["image"] = f"data:image/jpeg;base64,{text[:80]}*{text[80:]}"


def _set(key: str, value: Any) -> Callable[[_Hit], None]:
    return lambda hit: hit.record.update({key: value})


def _append_to_question(text: str) -> Callable[[_Hit], None]:
    def change(hit: _Hit) -> None:
        hit.turn("human")["value"] += text

    return change


_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 48213\n"
_HTML = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>404</body></html>\n"

BROKEN_IMAGES: dict[str, tuple[str, Callable[[_Hit], object]]] = {
    "missing image": ("image_missing", lambda hit: None),
    "zero-byte image": ("image_empty", lambda hit: hit.image.touch()),
    "truncated JPEG": ("image_damaged", lambda hit: _write_half(hit, "JPEG")),
    "truncated PNG": ("image_damaged", lambda hit: _write_half(hit, "PNG")),
    "HTML instead of an image": ("image_html", lambda hit: hit.image.write_bytes(_HTML)),
    "LFS pointer": ("image_lfs_pointer", lambda hit: hit.image.write_bytes(_LFS)),
    "random bytes": ("image_unknown", lambda hit: hit.image.write_bytes(b"\x07" + hit.rng.randbytes(999))),
    "folder instead of a file": ("image_not_a_file", lambda hit: hit.image.mkdir()),
    "too many pixels": ("image_pixels", _write_many_pixels),
    "too many bytes": ("image_bytes", _write_oversized_bytes),
    "absurd shape": ("image_shape", lambda hit: Image.new("RGB", (1200, 3)).save(hit.image, "PNG")),
    "floating-point pixels": ("image_unsupported", _write_float_tiff),
}

BROKEN_RECORDS: dict[str, tuple[str, Callable[[_Hit], object]]] = {
    "missing conversations": ("conversations", lambda hit: hit.record.pop("conversations")),
    "conversations is text": ("conversations", _set("conversations", "What is this?")),
    "empty conversations": ("conversations_empty", _set("conversations", [])),
    "turn without value": ("turn_form", lambda hit: hit.turn("gpt").pop("value")),
    "unknown role": ("unknown_role", lambda hit: hit.turn("gpt").update({"from": "robot"})),
    "wrong role order": ("role_order", lambda hit: hit.record["conversations"].reverse()),
    "last turn not an answer": (
        "no_final_answer",
        lambda hit: hit.record["conversations"].append({"from": "human", "value": "And now?"}),
    ),
    "empty answer": ("empty_answer", lambda hit: hit.turn("gpt").update(value="")),
    "blank answer": ("empty_answer", lambda hit: hit.turn("gpt").update(value=" \n")),
    "answer is a number": ("value_type", lambda hit: hit.turn("gpt").update(value=3)),
    "question is null": ("value_type", lambda hit: hit.turn("human").update(value=None)),
    "too few markers": ("marker_count", _too_few_markers),
    "too many markers": ("marker_count", _append_to_question(" <image>")),
    "half surrogate": ("surrogate", _append_to_question("\ud83d")),
    "null image name": ("image_field", _set("image", [None])),
    "empty image name": ("image_field", _set("image", "")),
    "image is a number": ("image_field", _set("image", 7)),
    "web address": ("web_address", _set("image", "https://example.com/a.jpg")),
    "broken base64": ("image_base64", _broken_base64),
    "duplicate id": ("duplicate_id", lambda hit: hit.record.update(id=hit.earlier["id"])),
    "the same record again": (
        "duplicate_record",
        lambda hit: (hit.record.clear(), hit.record.update(json.loads(json.dumps(hit.earlier)))),
    ),
}

REPLACED_RECORDS: dict[str, tuple[str, Callable[[Record], Any]]] = {
    "record is text": ("record_type", lambda record: "a record"),
    "record is a list": ("record_type", lambda record: [record]),
    "id is a list": ("id_type", lambda record: record | {"id": [1]}),
}
"""These lose their id; a report can only give their index."""

FAULTS: tuple[str, ...] = (*BROKEN_IMAGES, *BROKEN_RECORDS, *REPLACED_RECORDS)


def inject(
    data: Path,
    image_folder: Path,
    target: Path,
    *,
    n_faults: int,
    seed: int = 0,
    names: Sequence[str] = FAULTS,
) -> Seeded:
    """Copy a clean ``.json`` with its images and break ``n_faults`` of its records, the kinds in turn.

    Args:
        data: A list of LLaVA records with ids, each with one image.
        image_folder: What their image paths are relative to.
        target: A new folder for the copy.
        n_faults: How many records to hit, at most half of them.
        seed: Chooses the records.
        names: Which of `FAULTS`.
    """
    records: list[Any] = json.loads(data.read_text(encoding="utf-8"))
    images = target / "images"
    for name in dict.fromkeys(record["image"] for record in records):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image_folder / name, images / name)
    (images / "seeded").mkdir(parents=True)
    rng = random.Random(seed)
    places = rng.sample(range(1, len(records), 2), n_faults)  # odd places are hit, even ones are referred to
    found = [_break(records, index, names[number % len(names)], images, rng) for number, index in enumerate(places)]
    broken = target / data.name
    broken.write_text(json.dumps(records), encoding="utf-8")
    return Seeded(data=broken, image_folder=images, faults=tuple(sorted(found, key=lambda fault: fault.index)))


def _break(records: list[Any], index: int, name: str, images: Path, rng: random.Random) -> SeededFault:
    record = records[index]
    if name in REPLACED_RECORDS:
        kind, replace = REPLACED_RECORDS[name]
        records[index] = replace(record)
        return SeededFault(index=index, id=str(index), name=name, kind=kind)
    own = Path("seeded") / f"{index}.png"
    hit = _Hit(record, images / own, images / record["image"], records[index - 1], rng)
    if name in BROKEN_IMAGES:
        record["image"] = str(own)
        kind, change = BROKEN_IMAGES[name]
    else:
        kind, change = BROKEN_RECORDS[name]
    change(hit)
    return SeededFault(index=index, id=str(record["id"]), name=name, kind=kind)
