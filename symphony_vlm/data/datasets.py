"""Open a training or evaluation data set as a sequence of samples, whatever its format.

This file decides which reader a path gets and holds what they return; ``json_records.py``, ``tables.py``,
``tar_records.py`` and ``hub.py`` read the formats, ``records.py`` checks one record, ``preflight.py`` checks a whole
source and ``split.py`` divides it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, overload

from symphony_vlm.data.data_files import find_data_files
from symphony_vlm.data.hub import is_hub_id, open_hub_table
from symphony_vlm.data.json_records import read_json_lines, read_json_list
from symphony_vlm.data.preflight import Fault, PreflightReport, check_samples
from symphony_vlm.data.records import sample_from_record
from symphony_vlm.data.sample import Sample
from symphony_vlm.data.split import split_by_image
from symphony_vlm.data.tables import open_saved_table, open_table_files
from symphony_vlm.data.tar_records import TarRecords
from symphony_vlm.errors import InputError

__all__ = ["Fault", "PreflightReport", "SampleSource", "check_samples", "open_samples", "split_by_image"]


class _Records(Protocol):
    """What a reader hands over: raw records, each parsed when asked for."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def label(self, index: int) -> str: ...


class SampleSource(Sequence[Sample]):
    """The samples of one file or folder; each is built, and checked, when it is asked for.

    Args:
        path: The file or folder, or the name of a hub data set.
        records: Its raw records.
        image_folder: What relative image paths are relative to.
    """

    def __init__(self, *, path: Path, records: _Records, image_folder: Path) -> None:
        self.path = path
        self.image_folder = image_folder
        self._records = records

    @property
    def fingerprint(self) -> str:
        """sha256 of the file's content (of a folder: of its data files' names and contents; of tar shards: of their
        and their members' names, sizes and times)."""
        return self._records.fingerprint

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """Build one sample, or a list of them.

        Raises:
            InputError: The record is not valid; names file, record, field and remedy.
            IndexError: No such record.
        """
        if isinstance(index, slice):
            return [self._sample(number) for number in range(len(self))[index]]
        return self._sample(range(len(self))[operator.index(index)])

    def record(self, index: int) -> Any:
        """One record as its file has it, unchecked."""
        return self._records[index]

    def _sample(self, index: int) -> Sample:
        record = self._records[index]
        try:
            return sample_from_record(
                record,
                where=f"{self.path.name}: {self._records.label(index)}",
                index=index,
                image_folder=self.image_folder,
            )
        except InputError as error:
            name = record.get("id") if isinstance(record, dict) else None
            error.record_id = str(name) if isinstance(name, (str, int)) else None
            raise


def open_samples(
    path: str | Path, *, image_folder: str | Path | None = None, split: str | None = None, subset: str | None = None
) -> SampleSource:
    """Open a data set: a file by its extension, a folder by what it holds, or a data set of the Hugging Face hub.

    Args:
        path: ``.json``, ``.jsonl``, ``.parquet``, ``.arrow`` or ``.tar`` (webdataset); a folder of the last three (or
            with these in its folder ``data``, as repositories of the hub have them); a folder written by ``datasets``'
            ``save_to_disk``; or ``organisation/name`` on the hub if there is no such path.
        image_folder: What relative image paths are relative to; by default the folder of the data file (the working
            directory for a hub data set).
        split: Which split, where there are several; needed then.
        subset: Which configuration of a hub data set, where it has several.

    Raises:
        InputError: Missing, of an unknown format, unreadable as that format, with several splits of which none is
            chosen, or without records. Faults of single records are raised when the record is asked for;
            `check_samples` finds them all.
    """
    name, path = Path(path).as_posix(), Path(path)
    if image_folder is not None and not Path(image_folder).is_dir():
        raise InputError("is not a folder", where=f"image folder {str(image_folder)!r}")
    records: _Records
    if path.exists():
        if subset is not None:
            raise InputError(f"is on this machine and has no subset {subset!r}", where=str(path))
        records = _open_path(path, split)
        default_folder = path if path.is_dir() else path.parent
    elif is_hub_id(name):
        records = open_hub_table(name, subset=subset, split=split)
        default_folder = Path()
    else:
        raise InputError("does not exist", where=str(path), remedy=f"Relative paths start at {Path.cwd()}.")
    if not len(records):
        raise InputError("holds no records", where=str(path), remedy="Check that the right file was given.")
    return SampleSource(path=path, records=records, image_folder=Path(image_folder or default_folder))


def _open_path(path: Path, split: str | None) -> _Records:
    file_format, files = find_data_files(path, split)
    if file_format == "json":
        return read_json_list(files[0])
    if file_format == "jsonl":
        return read_json_lines(files[0])
    if file_format == "tar":
        return TarRecords(path, files)
    if file_format == "saved":
        return open_saved_table(files[0])
    return open_table_files(path, files, file_format)
