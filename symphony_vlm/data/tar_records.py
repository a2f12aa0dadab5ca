"""Records of webdataset tar shards: the files of a sample put together when it is asked for.

Of each sample these members are read, all others are passed over:

- ``.json``: a record of any form (``records.py``); if it has none, it is kept as the sample's other fields.
- ``.txt``: a caption, the answer to a question that consists of the images alone. Used if the JSON is no record.
- images (``.jpg``, ``.0.png``, ``.img1.webp`` ...): the record's own images, in the order of their names (2 before 10).
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from symphony_vlm.data.fields import is_given
from symphony_vlm.data.file_slices import FileSlices
from symphony_vlm.data.json_records import describe_json_error
from symphony_vlm.data.records import has_form
from symphony_vlm.data.tar_index import TarIndex, TarMember
from symphony_vlm.data.turns import IMAGE_MARKER
from symphony_vlm.errors import InputError

__all__ = ["TarRecords"]

MAX_MEMBER_BYTES = 64 * 2**20
"""Largest member that is read into memory."""

_OPEN_SHARDS = 32
"""Shards kept open at a time: data sets have thousands, and systems allow a process about a thousand open files."""

_IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm"})


class TarRecords:
    """A sequence of records as plain Python objects.

    Args:
        path: What the user gave, for messages.
        files: The shards, in order.

    Raises:
        InputError: A file is no tar file. Whatever is wrong with a sample is an error of that sample; the unreadable
            rest of a damaged shard counts as one sample.
    """

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self._path = path
        self._index = TarIndex(files)
        self._open: OrderedDict[Path, FileSlices] = OrderedDict()

    @property
    def fingerprint(self) -> str:
        """sha256 over the shards' and members' names, sizes and times; contents are not read for it."""
        return self._index.fingerprint

    def __len__(self) -> int:
        return len(self._index)

    def label(self, index: int) -> str:
        """How messages name the sample: shard (of a folder) and key."""
        sample = f"sample {self._index.members(index)[0].key!r}"
        return f"{self._index.shard(index).path.name}: {sample}" if self._path.is_dir() else sample

    def __getitem__(self, index: int) -> dict[str, Any]:
        where = f"{self._path.name}: {self.label(index)}"
        if index in self._index.damage:
            raise InputError(self._index.damage[index], where=where, remedy="Write or download the shard again.")
        shard, members = self._index.shard(index), self._index.members(index)
        by_extension = {member.extension: member for member in members}
        if len(by_extension) < len(members):
            names = [member.extension for member in members]
            twice = next(member.name for member in members if names.count(member.extension) > 1)
            raise InputError(f"the member {twice!r} stands twice in the shard", where=where)
        images = sorted(
            (member for member in members if member.extension.rpartition(".")[2] in _IMAGES),
            key=lambda member: _by_numbers(member.extension),
        )
        record = self._record(shard, by_extension, len(images), where)
        if record.get("id") is None:
            record["id"] = members[0].key
        own = _named_images(record, images, where)
        if own:
            record.pop("images", None)
            record["image"] = [{"bytes": self._read(shard, member, where), "path": member.name} for member in own]
        return record

    def _record(
        self, shard: FileSlices, by_extension: dict[str, TarMember], n_images: int, where: str
    ) -> dict[str, Any]:
        record: dict[str, Any] = {}
        if "json" in by_extension:
            record = self._json(shard, by_extension["json"], where)
            if has_form(record):
                return record
        if "txt" not in by_extension:
            found = ", ".join(sorted(member.name for member in by_extension.values()))
            raise InputError(
                f"has neither a record (.json with conversations, messages, or question and answer) nor a caption "
                f"(.txt) among its files {found}",
                where=where,
            )
        if not n_images:
            raise InputError("has a caption (.txt) but no image", where=where)
        caption = self._text(shard, by_extension["txt"], where)
        # What the JSON says about the image (img2dataset writes it) stays beside it.
        other = {key: value for key, value in record.items() if key not in ("image", "images")}
        return {**other, "question": IMAGE_MARKER * n_images, "answer": caption.strip()}

    def _json(self, shard: FileSlices, member: TarMember, where: str) -> dict[str, Any]:
        try:
            value = json.loads(self._read(shard, member, where).decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the member {member.name!r} {describe_json_error(error)}", where=where) from error
        if not isinstance(value, dict):
            raise InputError(f"the member {member.name!r} is not one JSON object", where=where)
        return value

    def _text(self, shard: FileSlices, member: TarMember, where: str) -> str:
        try:
            return self._read(shard, member, where).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"the member {member.name!r} {describe_json_error(error)}", where=where) from error

    def _read(self, shard: FileSlices, member: TarMember, where: str) -> bytes:
        problem, remedy = None, "Write or download the shard again."
        if member.start < 0:
            problem = "is a link, a device or a sparse file, without bytes of its own"
            remedy = "Write the shard with the files themselves (tar --dereference --hard-dereference)."
        elif member.start + member.size > shard.size:
            problem = f"is cut off: {member.size:,} bytes are declared, {max(0, shard.size - member.start):,} are there"
        elif member.size > MAX_MEMBER_BYTES:
            problem, remedy = f"has {member.size:,} bytes; the limit is {MAX_MEMBER_BYTES:,}", "Leave it out."
        if problem is not None:
            raise InputError(f"the member {member.name!r} {problem}", where=where, remedy=remedy)
        self._open[shard.path] = shard
        self._open.move_to_end(shard.path)
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        return shard.read(member.start, member.start + member.size)


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """Sorts runs of digits by their value: 2 before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _named_images(record: dict[str, Any], images: Sequence[TarMember], where: str) -> Sequence[TarMember]:
    """The images in the record's own order if it names them, else in the order of the members."""
    if not images:
        return []
    given = [record[field] for field in ("image", "images") if is_given(record.get(field)) and record[field] != []]
    if not given:
        return images
    names = given[0] if isinstance(given[0], list) else [given[0]]
    if len(given) > 1 or len(names) != len(images) or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"its record has {len(names)} image(s) of its own, but the shard {len(images)} for it",
            where=where,
            remedy="Leave the field 'image' out; the shard's images are taken in the order of their names.",
        )
    by_name = {
        name: member for member in images for name in (member.name, PurePosixPath(member.name).name, member.extension)
    }
    found = [by_name[name] for name in names if name in by_name]
    return found if len(set(found)) == len(images) else images
