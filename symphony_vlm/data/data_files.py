"""The files behind a path: which format a folder has, and which of its files belong to the wanted split."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from symphony_vlm.errors import InputError

__all__ = ["FILE_FORMATS", "DataFormat", "find_data_files"]

DataFormat = Literal["json", "jsonl", "parquet", "arrow", "tar", "saved"]

FILE_FORMATS: Mapping[str, DataFormat] = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "tar",
}
_FOLDER_FORMATS: tuple[DataFormat, ...] = ("parquet", "arrow", "tar")

_SUPPORTED = (
    ".json (a list of records), .jsonl (one a line), .parquet, .arrow, .tar (webdataset), a folder of .parquet, .arrow "
    "or .tar files, or a folder saved by datasets.Dataset.save_to_disk"
)

_shard = re.compile(r"(.+)-\d{5}-of-\d{5}").match
# As in datasets: the name of a split stands between separators, or at the start or end.
_keyword = re.compile(
    r"(?:^|[-._ 0-9])(train(?:ing)?|validation|valid|val|dev|test(?:ing)?|eval(?:uation)?)(?=[-._ 0-9]|$)",
    re.IGNORECASE,
).search
_SAME_SPLIT = {
    "training": "train",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
"""Names that ``datasets`` takes for one another."""


def find_data_files(path: Path, split: str | None) -> tuple[DataFormat, list[Path]]:
    """The format of an existing path, and its files in the order in which they are read.

    Args:
        path: A data file or a folder of them; of a saved data set the folder that holds ``state.json`` is returned.
        split: Which split's files, where there are several.

    Raises:
        InputError: An unknown format, no data files, files of several formats, several splits and none chosen, or no
            such split.
    """
    if path.is_dir():
        return _in_folder(path, split)
    file_format = FILE_FORMATS.get(path.suffix.lower())
    if file_format is None:
        compressed = path.suffix.lower() in (".gz", ".bz2", ".xz", ".zst", ".tgz", ".zip")
        raise InputError(
            f"has the extension {path.suffix!r}, which is not a known format",
            where=str(path),
            remedy=f"{'Decompress it; records are read by position. ' if compressed else ''}Supported: {_SUPPORTED}.",
        )
    if split is not None and file_format in ("json", "jsonl"):
        raise InputError(f"is one file and has no splits, but split {split!r} is wanted", where=str(path))
    return file_format, [path] if split is None else _of_split(path, [path], split)


def _in_folder(path: Path, split: str | None) -> tuple[DataFormat, list[Path]]:
    if (path / "dataset_dict.json").is_file():
        return "saved", [path / _saved_split(path, split)]
    if (path / "state.json").is_file():
        if split is not None:
            raise InputError(f"is a data set of one split, but split {split!r} is wanted", where=str(path))
        return "saved", [path]
    # Repositories of the hub keep their files in a folder "data".
    for folder in (path, path / "data"):
        found = {name: sorted(folder.glob(f"*.{name}")) for name in _FOLDER_FORMATS}
        formats = [name for name in _FOLDER_FORMATS if found[name]]
        if len(formats) > 1:
            raise InputError(
                f"the folder holds files of several formats ({', '.join(f'*.{name}' for name in formats)})",
                where=str(folder),
                remedy="Move them into folders of their own, or give one file.",
            )
        if formats:
            return formats[0], _of_split(folder, found[formats[0]], split)
    raise InputError(
        "the folder holds neither *.parquet, *.arrow or *.tar files nor a data set saved by "
        "datasets.Dataset.save_to_disk",
        where=str(path),
        remedy="Give the file, or the folder directly above the data files.",
    )


def _saved_split(path: Path, split: str | None) -> str:
    try:
        names = sorted(json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
        if not all(isinstance(name, str) and (path / name).is_dir() for name in names):
            raise ValueError(f"not all of {names} are folders")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"dataset_dict.json does not describe saved splits ({error!r})",
            where=str(path),
            remedy="Save it again with datasets.DatasetDict.save_to_disk.",
        ) from error
    return _choose(names, split, where=str(path))


def _of_split(folder: Path, files: Sequence[Path], split: str | None) -> list[Path]:
    # Reading train-*.parquet and test-*.parquet together would train on the test split in silence.
    names = {file: _split_name(file.stem) for file in files}
    if split is None and set(names.values()) == {""}:
        return list(files)
    chosen = _choose(sorted(set(names.values())), split, where=str(folder))
    return [file for file in files if names[file] == chosen]


def _split_name(stem: str) -> str:
    if (shard := _shard(stem)) is not None:
        return shard[1]
    keyword = _keyword(stem)
    return keyword[1].lower() if keyword else ""


def _choose(names: Sequence[str], split: str | None, *, where: str) -> str:
    listed = ", ".join(name or "files without the name of a split" for name in names)
    if split is None:
        if len(names) == 1:
            return names[0]
        raise InputError(
            f"holds several splits ({listed})",
            where=where,
            remedy="Choose one with split, or give the folder or file of one of them.",
        )
    if split in names:
        return split
    wanted = _SAME_SPLIT.get(split, split)
    alike = [name for name in names if _SAME_SPLIT.get(name, name) == wanted or _split_name(name) == wanted]
    if len(alike) != 1:
        raise InputError(f"has no split {split!r}", where=where, remedy=f"Found: {listed}.")
    return alike[0]
