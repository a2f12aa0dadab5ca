"""Raw records of a file, folder or hub data set, one after the other at bounded memory: what `streaming` reads from.

Nothing is decoded here: a JSON line stays bytes until `RawStream.record` is asked to parse it, and images stay
encoded. So a restart can pass over millions of records at the speed of reading them.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from symphony_vlm.errors import InputError

if TYPE_CHECKING:
    from datasets import IterableDataset

__all__ = ["RawStream", "StreamFile", "open_raw_stream"]

MAX_LINE_BYTES = MAX_MEMBER_BYTES = 2**26
"""A longer line, or a larger member of a tar, is damage or an attack; a record with a 20 MB picture in base64 fits."""

_ENDS = 2**20
_IMAGE_SUFFIXES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}


@dataclass(frozen=True, kw_only=True)
class StreamFile:
    """What to stream: a path, or the id of a hub data set, with its split and subset."""

    path: str
    split: str | None = None
    subset: str | None = None


class RawStream(Protocol):
    """A source that can be read from its beginning, any number of times."""

    fingerprint: str
    """Changes when the data does; cheap, so of a file's name, size, beginning and end only."""

    def __iter__(self) -> Iterator[Any]:
        """Raw records in the order of the data."""

    def record(self, raw: Any) -> Any:
        """The record as `sample_from_record` takes it.

        Raises:
            InputError: it cannot be parsed.
        """

    def place(self, index: int) -> str:
        """How messages name a record."""


def open_raw_stream(file: StreamFile) -> RawStream:
    """Opens a source for streaming.

    Args:
        file: ``.jsonl``, ``.parquet``, ``.tar`` (webdataset), a folder of parquet or tar files, a folder written by
            ``datasets.Dataset.save_to_disk``, or the id of a Hugging Face data set.

    Raises:
        InputError: missing, of a format that cannot be streamed, or not readable.
    """
    path = Path(file.path).expanduser()
    if not path.exists():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", file.path) and path.suffix.lower() not in (".json", ".jsonl", ".parquet"):
            return _open_hub(file)
        raise InputError("does not exist", where=file.path, remedy=f"Relative paths start at {Path.cwd()}.")
    if path.suffix.lower() == ".jsonl":
        return _JsonLines(path)
    tars = [path] if path.suffix.lower() == ".tar" else sorted(path.glob("*.tar")) if path.is_dir() else []
    if tars:
        return _Tars(tars)
    if (path / "state.json").is_file():
        return _Table(_open_saved(path), fingerprint=_ends_of(sorted(path.glob("*.arrow"))), name=path.name)
    tables = [path] if path.suffix.lower() == ".parquet" else sorted(path.glob("*.parquet")) if path.is_dir() else []
    if tables:
        return _Table(_open_parquet(tables), fingerprint=_ends_of(tables), name=path.name)
    raise InputError(
        "cannot be streamed",
        where=file.path,
        remedy="Streams: .jsonl, .parquet, .tar, folders of these, saved data sets, hub ids. A .json list is read as a "
        "whole: write one record a line into a .jsonl file, or leave streaming off.",
    )


class _JsonLines:
    """One record a line; blank lines are passed over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.fingerprint = _ends_of([path])

    def __iter__(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            if file.read(3) != b"\xef\xbb\xbf":
                file.seek(0)
            while line := file.readline(MAX_LINE_BYTES + 1):
                if len(line) > MAX_LINE_BYTES:
                    raise InputError(
                        f"a line has more than {MAX_LINE_BYTES:,} bytes",
                        where=self._path.name,
                        remedy="A .jsonl file has one record a line; is it a JSON list with a wrong name?",
                    )
                if line.strip():
                    yield line

    def record(self, raw: bytes) -> Any:
        try:
            return json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise InputError(f"is not valid JSON: {error}") from error

    def place(self, index: int) -> str:
        return f"record {index}"


class _Tars:
    """Webdataset: the members of a record stand together and share their name up to the first dot.

    A ``json`` member is the record; without conversations in it, a ``txt`` member is the image's caption.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self.fingerprint = _ends_of(paths)

    def __iter__(self) -> Iterator[dict[str, bytes]]:
        for path in self._paths:
            try:
                yield from self._groups(path)
            except (tarfile.TarError, OSError, EOFError) as error:
                raise InputError(f"cannot be read as tar: {error}", where=path.name) from error

    def _groups(self, path: Path) -> Iterator[dict[str, bytes]]:
        group: dict[str, bytes] = {}
        current = ""
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if member.size > MAX_MEMBER_BYTES:
                    raise InputError(
                        f"has {member.size:,} bytes; the limit is {MAX_MEMBER_BYTES:,}",
                        where=f"{path.name}: {member.name}",
                    )
                key = f"{folder}/{stem}" if folder else stem
                if key != current and group:
                    yield group
                    group = {}
                current = key
                content = archive.extractfile(member)
                assert content is not None
                group["key"] = key.encode()
                group[suffix.lower()] = content.read()
        if group:
            yield group

    def record(self, raw: dict[str, bytes]) -> Any:
        record: dict[str, Any] = {"id": raw["key"].decode()}
        try:
            if "json" in raw:
                values = json.loads(raw["json"])
                if not isinstance(values, dict):
                    return values
                record |= values
            caption = raw["txt"].decode() if "txt" in raw else None
        except (ValueError, RecursionError) as error:
            raise InputError(f"the text of {record['id']!r} is not valid: {error}") from error
        if caption is not None and not {"conversations", "messages", "question"} & record.keys():
            record |= {"question": "", "answer": caption}
        images = [content for suffix, content in raw.items() if suffix.rpartition(".")[2] in _IMAGE_SUFFIXES]
        if images:
            record["image"] = images[0] if len(images) == 1 else images
        return record

    def place(self, index: int) -> str:
        return f"record {index}"


class _Table:
    """Rows of a data set opened by ``datasets``; as Arrow values, so that it decodes nothing by its own rules."""

    _ROWS_AT_A_TIME = 8

    def __init__(self, table: IterableDataset, *, fingerprint: str, name: str) -> None:
        self._table = table.with_format("arrow")
        self.fingerprint = fingerprint
        self._name = name

    def __iter__(self) -> Iterator[dict[str, Any]]:
        import datasets
        import pyarrow as pa

        try:
            # `iter` and not iteration itself, which in a data loader's worker yields that worker's files only.
            for rows in self._table.iter(self._ROWS_AT_A_TIME):
                yield from rows.to_pylist()
        except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
            raise InputError(f"cannot be read: {str(error.__cause__ or error)[:300]}", where=self._name) from error

    def record(self, raw: dict[str, Any]) -> Any:
        return raw

    def place(self, index: int) -> str:
        return f"row {index}"


def _open_hub(file: StreamFile) -> RawStream:
    """At the commit that the hub has now, which is the fingerprint: a newer one stops a run that continues."""
    import datasets
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(file.path).sha
        found = datasets.load_dataset(file.path, name=file.subset, split=file.split, revision=commit, streaming=True)
    except Exception as error:  # datasets and the hub's client raise almost anything here
        raise InputError(
            f"cannot be opened as a Hugging Face data set: {' '.join(str(error).split())[:300]}",
            where=file.path,
            remedy="Check the id, subset and split, and whether the hub can be reached; or give a local path.",
        ) from error
    if isinstance(found, dict):
        raise InputError(
            f"has the splits {', '.join(found)}", where=file.path, remedy="Give the source one of them as its split."
        )
    return _Table(found, fingerprint=f"commit {commit}", name=file.path)


def _open_saved(path: Path) -> IterableDataset:
    import datasets

    return datasets.load_from_disk(str(path)).to_iterable_dataset()


def _open_parquet(files: list[Path]) -> IterableDataset:
    import datasets

    # Escaped, because datasets takes a path for a pattern.
    patterns = [glob.escape(str(file)) for file in files]
    return datasets.load_dataset("parquet", data_files=patterns, split="train", streaming=True)


def _ends_of(files: list[Path]) -> str:
    """sha256 over each file's name, size, first and last MiB: a stream may be too large to read as a whole."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(_ENDS, size - _ENDS))
            digest.update(file.read(_ENDS))
    return digest.hexdigest()
