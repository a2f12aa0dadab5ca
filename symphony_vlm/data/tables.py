"""Rows of parquet files or of a folder saved by ``datasets``, read from the memory-mapped table one at a time.

Images stay encoded: the raw Arrow values are taken, so ``datasets`` decodes nothing by its own rules.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symphony_vlm.data.records import RecordForm
from symphony_vlm.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["TableRows", "open_table"]

_SPLITS = ("train", "validation", "test")


class TableRows:
    """A sequence of rows as plain Python objects.

    Args:
        table: The data set.
        form: Which form its rows have.
        fingerprint: sha256 of the files' contents.
    """

    def __init__(self, *, table: Dataset, form: RecordForm, fingerprint: str) -> None:
        self.form = form
        self.fingerprint = fingerprint
        self._table = table.with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self._table[index].to_pylist()[0]
        return row

    def label(self, index: int) -> str:
        """How messages name the row."""
        return f"row {index}"


def open_table(path: Path) -> TableRows:
    """Open a ``.parquet`` file, a folder of them (one split), or a folder written by ``Dataset.save_to_disk``.

    Raises:
        InputError: No such files, unreadable, several splits, or columns of neither form.
    """
    saved = path.is_dir() and (path / "state.json").is_file()
    files = _saved_files(path) if saved else _parquet_files(path)
    table = _load(path, files, saved=saved)
    return TableRows(table=table, form=_form(table.column_names, path), fingerprint=_fingerprint(files))


def _parquet_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in path.iterdir() if child.is_dir())
        raise InputError(
            f"holds several splits ({', '.join(splits)})", where=str(path), remedy="Give the folder of one of them."
        )
    files = sorted(path.glob("*.parquet"))
    if not files:
        raise InputError(
            "the folder holds neither *.parquet files nor a data set saved by datasets.Dataset.save_to_disk",
            where=str(path),
            remedy="Give the file, or the folder directly above the .parquet files.",
        )
    # Reading train-*.parquet and test-*.parquet together would train on the test split in silence.
    splits = [split for split in _SPLITS if any(file.name.startswith(split) for file in files)]
    if len(splits) > 1:
        raise InputError(
            f"the folder holds the parquet files of several splits ({', '.join(splits)})",
            where=str(path),
            remedy="Move each split into its own folder and give one of them.",
        )
    return files


def _saved_files(path: Path) -> list[Path]:
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return [path / entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"state.json does not describe a saved data set ({error!r})",
            where=str(path),
            remedy="Save it again with datasets.Dataset.save_to_disk.",
        ) from error


def _load(path: Path, files: Sequence[Path], *, saved: bool) -> Dataset:
    import datasets
    import pyarrow as pa

    try:
        if saved:
            return datasets.load_from_disk(str(path))
        # Escaped, because datasets takes a path for a pattern: a folder named "data [v1]" would hold no files.
        patterns = [glob.escape(str(file)) for file in files]
        return datasets.load_dataset("parquet", data_files=patterns, split="train")
    except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise InputError(
            f"cannot be read as {'a saved data set' if saved else 'parquet'}: {str(cause)[:300]}",
            where=str(path),
            remedy="Write or download it again; all parquet files of a folder must have the same columns.",
        ) from error


def _form(columns: Sequence[str], path: Path) -> RecordForm:
    if "conversations" in columns:
        return "conversation"
    if {"question", "answer"} <= set(columns):
        return "question"
    raise InputError(
        f"has the columns {', '.join(columns)}; it must have either conversations, or question and answer",
        where=path.name,
        remedy="Rename the columns; images are read from the column image.",
    )


def _fingerprint(files: Sequence[Path]) -> str:
    """sha256 of one file's content; of several, over their names and hashes."""
    digests = [(file.name, _sha256(file)) for file in files]
    if len(digests) == 1:
        return digests[0][1]
    return hashlib.sha256("".join(f"{name}\0{digest}\n" for name, digest in digests).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
