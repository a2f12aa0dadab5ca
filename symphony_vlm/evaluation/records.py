"""Files of records, one JSON line an item: appended so that a kill costs little, merged whatever wrote them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from symphony_vlm.data.fields import shortened
from symphony_vlm.errors import InputError
from symphony_vlm.files import write_text

__all__ = ["Record", "RecordWriter", "drop_records", "merge_records", "part_path", "read_records"]

Record = dict[str, Any]

SYNC_RECORDS = 32
SYNC_SECONDS = 10.0


def part_path(path: Path, rank: int) -> Path:
    """Where one process of several writes its records of the cell whose file is ``path``."""
    return path.parent / "parts" / f"{path.stem}.rank{rank}.jsonl"


class RecordWriter:
    """Appends records to a file.

    What is written survives a kill at once; a power loss takes at most 32 records or 10 seconds.

    Args:
        path: Made with its folder if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._waiting = 0
        self._synced = time.monotonic()

    def write(self, records: Iterable[Record]) -> None:
        """Appends a line each."""
        for record in records:
            self._file.write(_line(record))
            self._waiting += 1
            if self._waiting >= SYNC_RECORDS:
                self._sync()
        self._file.flush()
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._waiting = 0
        self._synced = time.monotonic()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            self._sync()


def read_records(path: Path) -> list[Record]:
    """Records of a predictions file; a last line torn by a kill is cut off the file."""
    if not path.is_file():
        return []
    records = []
    good_bytes = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("no line end")
                records.append(_checked(json.loads(line)))
            except ValueError as error:
                if file.read(1):
                    raise InputError(f"line {number} is no record ({error})", where=str(path)) from error
                break
            good_bytes += len(line)
    if good_bytes < path.stat().st_size:
        os.truncate(path, good_bytes)
    return records


def merge_records(path: Path) -> dict[str, Record]:
    """Makes one file of a cell's own and those of all processes, now or of an earlier start: sorted by item id.

    Which process answered what, and in which order, leaves no trace but in the fields ``seconds`` and ``rank``. No
    process may be writing.

    Args:
        path: The cell's file. It is replaced at once; the parts are removed after that.

    Returns:
        Item id -> record.

    Raises:
        InputError: Two records of an item disagree in the text, or a file cannot be read.
    """
    sources = [path, *sorted((path.parent / "parts").glob(f"{path.stem}.rank*.jsonl"))]
    found: dict[str, tuple[Path, Record]] = {}
    for source in sources:
        for record in read_records(source):
            first, known = found.setdefault(record["item_id"], (source, record))
            if known["prediction"] != record["prediction"]:
                raise InputError(
                    f"item {shortened(record['item_id'])} was answered {shortened(record['prediction'])}, but "
                    f"{shortened(known['prediction'])} in {first}",
                    where=str(source),
                    remedy="The files are of different models or settings: keep one's, or give another --output.",
                )
    merged = {key: found[key][1] for key in sorted(found)}
    text = "".join(map(_line, merged.values()))
    if merged and (not path.is_file() or path.read_text(encoding="utf-8") != text):
        write_text(path, text)
    for part in sources[1:]:
        part.unlink()
    return merged


def drop_records(path: Path, items: Collection[str]) -> None:
    """Takes the records of some items out of a file, which is replaced at once. No process may be writing."""
    if items:
        kept = [record for record in read_records(path) if record["item_id"] not in items]
        write_text(path, "".join(map(_line, kept)))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _checked(value: Any) -> Record:
    if not isinstance(value, dict) or not isinstance(value.get("item_id"), str) or "prediction" not in value:
        raise ValueError("it must be an object with item_id and prediction")
    return value
