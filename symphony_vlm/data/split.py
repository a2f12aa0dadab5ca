"""Divide records into training and validation so that no image is on both sides."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence

from symphony_vlm.data.images import image_key
from symphony_vlm.data.sample import ImageRef, Sample
from symphony_vlm.errors import InputError

__all__ = ["portable_name", "split_by_image"]


def split_by_image(
    source: Sequence[Sample],
    usable: Sequence[int],
    *,
    fraction: float,
    seed: int,
    key: Callable[[ImageRef], str] = image_key,
) -> tuple[list[int], list[int]]:
    """Choose validation records, deterministically, by image.

    Records that share an image, directly or through other records, form a group; a record without an image is grouped
    by its id. Groups are taken in the order of ``sha256(seed, name)`` while they fit into ``fraction`` of the records,
    so the choice does not depend on the order of the records or on where the folder lies. A group too large for the
    share (one placeholder image under half of the records, say) stays in training.

    Args:
        source: What `open_samples` returned.
        usable: The indices to divide, e.g. `PreflightReport.usable`.
        fraction: Share of the records for validation, 0 to below 1. Above 0 each side gets at least one group, if there
            are two.
        seed: Another seed chooses other groups.
        key: What makes two references the same image.

    Returns:
        Training and validation indices, each in the order of ``usable``.

    Raises:
        InputError: ``fraction`` is out of range, or a record in ``usable`` is not valid.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"the validation fraction is {fraction}; it must be at least 0 and below 1")
    if fraction == 0:
        return list(usable), []
    groups = _groups(source, usable, seed, key)
    chosen = _choose(groups, target=max(1, round(fraction * len(usable)))) if len(groups) > 1 else set()
    return [index for index in usable if index not in chosen], [index for index in usable if index in chosen]


def _choose(groups: Sequence[Sequence[int]], *, target: int) -> set[int]:
    taken: list[Sequence[int]] = []
    n_taken = 0
    for group in groups:
        if n_taken + len(group) <= target:
            taken.append(group)
            n_taken += len(group)
    if not taken:
        taken = [min(groups, key=len)]
    if len(taken) == len(groups):
        taken = taken[:-1]
    return {index for group in taken for index in group}


def _groups(
    source: Sequence[Sample], usable: Sequence[int], seed: int, key_of: Callable[[ImageRef], str]
) -> list[list[int]]:
    """Groups of record indices, in the order in which they are taken for validation."""
    parent: dict[str, str] = {}
    rank: dict[str, str] = {}
    first_key: dict[int, str] = {}
    for index in usable:
        sample = source[index]
        names = {key_of(ref): portable_name(ref) for ref in sample.images} or {f"id:{sample.id}": f"id:{sample.id}"}
        for key, name in names.items():
            parent.setdefault(key, key)
            rank[key] = min(rank.get(key, "~"), hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())
        first_key[index], *others = names
        for key in others:
            parent[_root(parent, key)] = _root(parent, first_key[index])
    members: dict[str, list[int]] = {}
    for index, key in first_key.items():
        members.setdefault(_root(parent, key), []).append(index)
    order: dict[str, str] = {}
    for key, value in rank.items():
        root = _root(parent, key)
        order[root] = min(order.get(root, "~"), value)
    return [members[root] for root in sorted(members, key=order.__getitem__)]


def portable_name(ref: ImageRef) -> str:
    """The image as the record names it: the same after the whole data set has moved to another folder."""
    return image_key(ref) if ref.data is not None or not ref.name else f"name:{os.path.normpath(ref.name)}"


def _root(parent: dict[str, str], key: str) -> str:
    while parent[key] != key:
        parent[key] = parent[parent[key]]
        key = parent[key]
    return key
