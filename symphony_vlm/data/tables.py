"""Rows of parquet and Arrow files, of a folder saved by ``datasets``, or of a hub data set, read one at a time.

They stay in memory-mapped Arrow files. Images stay encoded: the raw Arrow values are taken, so ``datasets`` decodes
nothing by its own rules.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symphony_vlm.data.records import FORMS, has_form
from symphony_vlm.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["TableRows", "fingerprint_of_files", "open_saved_table", "open_table_files"]


class TableRows:
    """A sequence of rows as plain Python objects.

    Args:
        table: The data set.
        name: For messages.
        fingerprint: Of the rows.
        any_columns: Whether rows need not be conversations or questions (benchmarks have columns of their own).

    Raises:
        InputError: Its columns fit none of the forms of records.
    """

    def __init__(self, *, table: Dataset, name: str, fingerprint: str, any_columns: bool = False) -> None:
        if not any_columns and not has_form(table.column_names):
            raise InputError(
                f"has the columns {', '.join(table.column_names)}; it must have {FORMS}",
                where=name,
                remedy="Rename the columns; images are read from the column image or images.",
            )
        self.fingerprint = fingerprint
        self._name = name
        self._table = table.with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self._table[index].to_pylist()[0]
        return row

    def texts(self, column: str) -> Iterator[str | None]:
        """A column of text from its first row to its last, much faster than row by row.

        Raises:
            InputError: no such column, or one of something else.
        """
        import pyarrow as pa

        kind = self._table.features.arrow_schema.field(column).type if column in self._table.column_names else None
        if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise InputError(
                f"has the columns {', '.join(self._table.column_names)}; a column {column!r} of text is needed",
                where=self._name,
                remedy="Rename the column that has the text.",
            )
        for rows in self._table.iter(batch_size=1000):
            yield from rows.column(column).to_pylist()

    def label(self, index: int) -> str:
        """How messages name the row."""
        return f"row {index}"


def open_table_files(path: Path, files: Sequence[Path], file_format: str, *, any_columns: bool = False) -> TableRows:
    """Open ``parquet`` or ``arrow`` files, one after the other.

    Arrow files in the stream format (what ``datasets`` writes) are mapped in place; for others ``datasets`` keeps a
    converted copy in its cache.

    Args:
        path: What the user gave, for messages.
        files: All with the same columns.
        file_format: ``parquet`` or ``arrow``.
        any_columns: As in `TableRows`.

    Raises:
        InputError: Not readable, or of columns of no form.
    """
    import datasets
    import pyarrow as pa

    try:
        if file_format == "arrow" and all(_is_stream(file) for file in files):
            table = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
        else:
            # Escaped, because datasets takes a path for a pattern: a folder named "data [v1]" would hold no files.
            patterns = [glob.escape(str(file)) for file in files]
            table = datasets.load_dataset(file_format, data_files=patterns, split="train")
    except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise InputError(
            f"cannot be read as {file_format}: {str(cause)[:300]}",
            where=str(path),
            remedy=f"Write or download it again; all {file_format} files of a folder must have the same columns.",
        ) from error
    return TableRows(table=table, name=path.name, fingerprint=fingerprint_of_files(files), any_columns=any_columns)


def open_saved_table(path: Path, *, any_columns: bool = False) -> TableRows:
    """Open the folder of one split written by ``Dataset.save_to_disk``.

    Raises:
        InputError: Not readable, or of columns of no form.
    """
    import datasets
    import pyarrow as pa

    files = _saved_files(path)
    try:
        table = datasets.load_from_disk(str(path))
    except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"cannot be read as a saved data set: {str(error.__cause__ or error)[:300]}",
            where=str(path),
            remedy="Write or download it again.",
        ) from error
    return TableRows(table=table, name=path.name, fingerprint=fingerprint_of_files(files), any_columns=any_columns)


def _is_stream(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(6) != b"ARROW1"


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


def fingerprint_of_files(files: Sequence[Path]) -> str:
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
