"""Data sets by their name on the Hugging Face hub, downloaded once into the cache of ``datasets``.

No code of a data set is ever run (``datasets`` 4 and later cannot).
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from symphony_vlm.data.data_files import FILE_FORMATS
from symphony_vlm.data.tables import TableRows, fingerprint_of_files
from symphony_vlm.errors import InputError

__all__ = ["is_hub_id", "open_hub_table"]

_hub_id = re.compile(r"[A-Za-z0-9][\w-]*(\.[\w-]+)*/[A-Za-z0-9][\w-]*(\.[\w-]+)*").fullmatch


def is_hub_id(name: str) -> bool:
    """Whether a path that does not exist can be the name of a hub data set: ``organisation/name``, no data file."""
    return _hub_id(name) is not None and not name.lower().endswith(tuple(FILE_FORMATS))


def open_hub_table(name: str, *, subset: str | None, split: str | None, any_columns: bool = False) -> TableRows:
    """Open a hub data set, from the cache if it is there.

    Args:
        name: ``organisation/name``.
        subset: Its configuration, where it has several.
        split: The split, where it has several; ``train[:1000]`` and the like are understood.
        any_columns: As in `TableRows`.

    Raises:
        InputError: Not found, not allowed (gated), no network and not in the cache, several subsets or splits and none
            chosen, no such one, or columns of no form.
    """
    import datasets

    try:
        if split is None:
            split = _only_split(name, subset)
        table = datasets.load_dataset(name, name=subset, split=split, keep_in_memory=False)
    except (InputError, MemoryError):
        raise
    # Besides its own errors, datasets lets through those of the hub's client, its HTTP library and every file format.
    except Exception as error:
        raise _hub_error(name, error) from error
    files = fingerprint_of_files([Path(entry["filename"]) for entry in table.cache_files])
    fingerprint = hashlib.sha256(f"{files}\0{split}".encode()).hexdigest()  # of train[:10] and train they are the same
    return TableRows(table=table, name=name, fingerprint=fingerprint, any_columns=any_columns)


def _only_split(name: str, subset: str | None) -> str:
    """The split of a data set that has one. Asked before anything large is downloaded."""
    import datasets

    builder = datasets.load_dataset_builder(name, name=subset)
    splits = list(builder.info.splits or builder.config.data_files or ())
    if len(splits) != 1:
        raise InputError(
            f"has several splits ({', '.join(map(str, splits))})" if splits else "does not say which splits it has",
            where=f"hub data set {name!r}",
            remedy="Choose one with split.",
        )
    return str(splits[0])


def _hub_error(name: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    folder = name.split("/")[-1]
    download = f"hf download {name} --repo-type dataset --local-dir {folder}"
    if isinstance(error, ValueError) and ("split" in reason.lower() or "config" in reason.lower()):
        remedy = "Choose among these with subset and split."
    elif "gated" in reason.lower():
        remedy = (
            f"Accept its terms at https://huggingface.co/datasets/{name} and log in with 'hf auth login', or give the "
            f"folder of a copy made with '{download}'."
        )
    else:
        remedy = (
            f"If it is a folder or file on this machine, correct the path (relative ones start at {Path.cwd()}). If it "
            f"is on the hub, run '{download}' where there is a network, and give that folder."
        )
    return InputError(f"cannot be opened: {reason}", where=f"{name!r} (no such path, so a hub data set)", remedy=remedy)
