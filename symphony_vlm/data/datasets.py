"""Open a training or evaluation file as a sequence of samples, whatever its format.

This file decides which reader a path gets and holds what they return; ``json_records.py`` and ``tables.py`` read the
formats, ``records.py`` checks one record, ``preflight.py`` checks a whole source and ``split.py`` divides it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, overload

from symphony_vlm.data.json_records import read_json_lines, read_json_list
from symphony_vlm.data.preflight import Fault, PreflightReport, check_samples
from symphony_vlm.data.records import RecordForm, sample_from_record
from symphony_vlm.data.sample import Sample
from symphony_vlm.data.split import split_by_image
from symphony_vlm.data.tables import open_table
from symphony_vlm.errors import InputError

__all__ = ["Fault", "PreflightReport", "SampleSource", "check_samples", "open_samples", "split_by_image"]

_FORMATS = (
    ".json (a list of LLaVA records), .jsonl (one a line), .parquet, a folder of .parquet files, "
    "or a folder saved by datasets.Dataset.save_to_disk"
)


class _Records(Protocol):
    """What a reader hands over: raw records, each parsed when asked for."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def label(self, index: int) -> str: ...


class SampleSource(Sequence[Sample]):
    """The samples of one file or folder; each is built, and checked, when it is asked for.

    Args:
        path: The file or folder.
        records: Its raw records.
        form: Which form they have.
        image_folder: What relative image paths are relative to.
    """

    def __init__(self, *, path: Path, records: _Records, form: RecordForm, image_folder: Path) -> None:
        self.path = path
        self.image_folder = image_folder
        self._records = records
        self._form: RecordForm = form

    @property
    def fingerprint(self) -> str:
        """sha256 of the file's content (of a folder: of its data files' names and contents)."""
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

    def _sample(self, index: int) -> Sample:
        record = self._records[index]
        try:
            return sample_from_record(
                record,
                form=self._form,
                where=f"{self.path.name}: {self._records.label(index)}",
                index=index,
                image_folder=self.image_folder,
            )
        except InputError as error:
            name = record.get("id") if isinstance(record, dict) else None
            error.record_id = str(name) if isinstance(name, (str, int)) else None
            raise


def open_samples(path: Path, *, image_folder: Path | None = None) -> SampleSource:
    """Open a data file by its extension.

    Args:
        path: ``.json``, ``.jsonl``, ``.parquet``, a folder of parquet files, or a folder written by
            ``datasets.Dataset.save_to_disk``.
        image_folder: What relative image paths are relative to; by default the folder of the data file.

    Raises:
        InputError: Missing, of an unknown format, unreadable as that format, or without records. Faults of single
            records are raised when the record is asked for; `check_samples` finds them all.
    """
    path = Path(path)
    if not path.exists():
        raise InputError("does not exist", where=str(path), remedy=f"Relative paths start at {Path.cwd()}.")
    if image_folder is not None and not Path(image_folder).is_dir():
        raise InputError("is not a folder", where=f"image folder {str(image_folder)!r}")
    folder = Path(image_folder) if image_folder is not None else path if path.is_dir() else path.parent
    suffix = path.suffix.lower()
    form: RecordForm = "conversation"
    records: _Records
    if path.is_dir() or suffix == ".parquet":
        records = table = open_table(path)
        form = table.form
    elif suffix in (".json", ".jsonl"):
        records = read_json_list(path) if suffix == ".json" else read_json_lines(path)
    else:
        raise InputError(
            f"has the extension {path.suffix!r}, which is not a known format",
            where=str(path),
            remedy=f"Supported: {_FORMATS}.",
        )
    if not len(records):
        raise InputError("holds no records", where=str(path), remedy="Check that the right file was given.")
    return SampleSource(path=path, records=records, form=form, image_folder=folder)
