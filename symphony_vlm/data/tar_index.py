"""Where the members of webdataset shards lie: tar files are read in place, nothing is extracted.

A *sample* is all members with the same name up to the first dot after the last slash. The index holds about 40 bytes
and the name for each member.
"""

from __future__ import annotations

import hashlib
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from symphony_vlm.data.file_slices import FileSlices
from symphony_vlm.errors import InputError

__all__ = ["TarIndex", "TarMember"]

_BLOCK = tarfile.BLOCKSIZE
_NO_DATA = -1
"""Offset of a member without bytes of its own (a link, a device, a sparse file)."""


@dataclass(frozen=True)
class TarMember:
    """A file inside a shard."""

    name: str
    start: int
    """Where its bytes start in the shard, or -1 if it has none of its own."""
    size: int

    @property
    def key(self) -> str:
        """The sample it belongs to: ``cats/a`` of ``cats/a.img1.png``."""
        folder, slash, file = self.name.rpartition("/")
        return f"{folder}{slash}{file.partition('.')[0]}"

    @property
    def extension(self) -> str:
        """What follows the first dot of the file name, in lower case: ``img1.png`` of ``cats/a.img1.png``."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()


class TarIndex:
    """The samples of some shards, in order of their first members.

    Args:
        files: Uncompressed tar files.

    Raises:
        InputError: A file is no tar file, or is compressed.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.shards = [FileSlices(file) for file in files]
        self._names = bytearray()
        self._name_ends = array("q")
        self._starts = array("q")
        self._sizes = array("q")
        self._sample_ends = array("q")  # the number of the first member behind each sample
        self._shard_ends: list[int] = []  # the number of the first sample behind each shard
        self.damage: dict[int, str] = {}
        """Samples that stand for the unreadable rest of a shard, with the reason."""
        digest = hashlib.sha256()
        for shard in self.shards:
            self._add(shard, digest)
        self.fingerprint: str = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._sample_ends)

    def shard(self, sample: int) -> FileSlices:
        """The shard that holds a sample."""
        return self.shards[bisect_right(self._shard_ends, sample)]

    def members(self, sample: int) -> list[TarMember]:
        """A sample's members in the order in which they lie in the shard."""
        first = self._sample_ends[sample - 1] if sample else 0
        return [
            TarMember(self._name(number), self._starts[number], self._sizes[number])
            for number in range(first, self._sample_ends[sample])
        ]

    def _name(self, number: int) -> str:
        start = self._name_ends[number - 1] if number else 0
        return self._names[start : self._name_ends[number]].decode(errors="surrogateescape")

    def _add(self, shard: FileSlices, digest: hashlib._Hash) -> None:
        samples: dict[str, list[TarMember]] = {}
        last = TarMember("", 0, 0)
        problem = None
        digest.update(f"{shard.path.name}\0{shard.size}\n".encode(errors="surrogateescape"))
        try:
            for last, modified in _members(shard.path):
                digest.update(f"{last.name}\0{last.size}\0{modified}\n".encode(errors="surrogateescape"))
                # Hidden files are left out: macOS adds ._a.jpg to every a.jpg.
                if not last.name.rpartition("/")[2].startswith("."):
                    samples.setdefault(last.key, []).append(last)
        except _Damage as error:
            problem = str(error)
        for members in samples.values():
            self._add_sample(members)
        # A last member that is cut off is reported with its sample already.
        if problem is not None and last.start + last.size <= shard.size:
            self.damage[len(self)] = f"{problem}; what follows the member {last.name!r} cannot be read"
            self._add_sample([last])
        self._shard_ends.append(len(self))

    def _add_sample(self, members: Sequence[TarMember]) -> None:
        for member in members:
            self._names += member.name.encode(errors="surrogateescape")
            self._name_ends.append(len(self._names))
            self._starts.append(member.start)
            self._sizes.append(member.size)
        self._sample_ends.append(len(self._starts))


class _Damage(Exception):
    """The rest of a tar file cannot be read."""


def _members(path: Path) -> Iterator[tuple[TarMember, float]]:
    """Each member with its time of modification, folders left out.

    Raises:
        InputError: Not a tar file.
        _Damage: It ends before its end mark.
    """
    try:
        tar = tarfile.open(path, "r:")  # noqa: SIM115
    except (OSError, tarfile.TarError, ValueError, OverflowError) as error:
        raise InputError(
            f"cannot be read as an uncompressed tar file: {error}",
            where=str(path),
            remedy="Download it again, or decompress it (gunzip) if it is compressed.",
        ) from error
    with tar:
        # Python 3.10 fails if it is asked for the next member of a file without any.
        has_members = tar.firstmember is not None  # type: ignore[attr-defined]
        while has_members:
            try:
                info = tar.next()
            except (OSError, tarfile.TarError, ValueError, OverflowError) as error:
                raise _Damage(f"the shard is damaged or cut off at byte {tar.offset:,} ({error})") from error
            if info is None:
                break
            if info.size < 0:
                raise _Damage(f"the shard is damaged: member {info.name!r} has the size {info.size}")
            tar.members = []  # type: ignore[attr-defined]  # it keeps every header it has seen
            if not info.isdir():
                plain = info.isreg() and not info.issparse()
                yield TarMember(info.name, info.offset_data if plain else _NO_DATA, info.size), info.mtime
        # A damaged header ends the reading in silence, just as the mark of two empty blocks does.
        with path.open("rb") as file:
            file.seek(tar.offset)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise _Damage(f"the shard is damaged or cut off at byte {tar.offset:,}")
