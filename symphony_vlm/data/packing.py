"""Sequence packing: several conversations in one row of a batch, so that hardly any token is padding.

Which conversations share a row is decided once for a stage, from true token counts and the seed. The row is then an
item of the data set like any other: the Trainer's shuffling, sharding and resuming need to know nothing about it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from symphony_vlm.data.collator import ConversationCollator, ConversationDataset, EncodedSample
from symphony_vlm.data.conversation import IGNORE_INDEX
from symphony_vlm.errors import InputError

__all__ = ["PackedCollator", "PackedDataset", "pack_best_fit"]


def pack_best_fit(lengths: Sequence[int], capacity: int, *, seed: int) -> list[list[int]]:
    """Packs items into as few packs as best fit finds: each goes where it leaves the least room.

    Items are taken in a random order and not by size: packs of one size would not be random samples of the data. Best
    fit needs at most 1.7 times the least number of packs, for any order (Johnson et al., 1974, doi 10.1137/0203025);
    conversations, which are many and short, fill packs to a few tokens.

    Args:
        lengths: tokens of each item.
        capacity: tokens of a pack.
        seed: of the order.

    Returns:
        Indices of the items of each pack; every item is in one of them.

    Raises:
        InputError: an item is longer than a pack.
    """
    packs: list[list[int]] = []
    open_by_room: dict[int, list[int]] = defaultdict(list)
    # Bit r says that a pack with room for r tokens is open: the lowest bit at or above a length is the best fit.
    rooms = 0
    for item in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        length = lengths[item]
        if length > capacity:
            raise InputError(
                f"item {item} has {length} tokens, a pack {capacity}", where="packing", remedy="Raise max_length."
            )
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = open_by_room[room].pop()
            packs[pack].append(item)
            if not open_by_room[room]:
                rooms ^= 1 << room
        else:
            room, pack = capacity, len(packs)
            packs.append([item])
        open_by_room[room - length].append(pack)
        rooms |= 1 << (room - length)
    return packs


class PackedDataset(Dataset[list[EncodedSample]]):
    """Rows of several conversations each.

    Args:
        samples: the conversations.
        max_length: tokens of a row; no conversation may have more.
        seed: of the random order in which conversations are packed.
    """

    def __init__(self, samples: ConversationDataset, *, max_length: int, seed: int) -> None:
        self._samples = samples
        lengths = [samples.num_tokens(index) for index in range(len(samples))]
        self._packs = pack_best_fit(lengths, max_length, seed=seed)
        self.num_samples = len(samples)
        """How many conversations there are in all rows."""
        self.filled = sum(lengths) / max(1, len(self._packs) * max_length)
        """Share of the rows' places that hold a token."""

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> list[EncodedSample]:
        return [self._samples[item] for item in self._packs[index]]


@dataclass(frozen=True)
class PackedCollator:
    """Makes a batch of packed rows, in which a conversation is a document (`moe.documents`)."""

    rows: ConversationCollator
    """Pads the rows and stacks their images."""

    def __call__(self, packs: Sequence[Sequence[EncodedSample]]) -> dict[str, Tensor]:
        """``input_ids``, ``labels``, ``document_ids`` ``[B, S]`` and, if there are images, ``pixel_values``.

        ``document_ids`` counts the conversations of a row, -1 for padding. It takes the attention mask's place.
        """
        batch = self.rows([_join(pack) for pack in packs])
        ids = torch.full_like(batch["input_ids"], -1)
        for row, pack in zip(ids, packs, strict=True):
            lengths = torch.tensor([len(sample["input_ids"]) for sample in pack])
            row[: lengths.sum()] = torch.arange(len(pack)).repeat_interleave(lengths)
        del batch["attention_mask"]
        return batch | {"document_ids": ids}


def _join(pack: Sequence[EncodedSample]) -> EncodedSample:
    """One long sample. The first token of a conversation is not predicted: before it stands another conversation."""
    joined: dict[str, Any] = {}
    for name, first in pack[0].items():
        values: list[Any] = [sample[name] for sample in pack]  # type: ignore[literal-required]
        if isinstance(first, np.ndarray):
            joined[name] = np.concatenate(values)
        else:
            joined[name] = [item for value in values for item in value]
    starts = np.cumsum([0, *(len(sample["input_ids"]) for sample in pack[:-1])])
    joined["labels"][starts] = IGNORE_INDEX
    return joined  # type: ignore[return-value]
