"""Items that hold a place in a batch and teach nothing, so that every process has equally many batches.

A placeholder is one padding token that is not supervised: its loss is zero, and as a real token it is safe in every
implementation of attention, some of which fail on a row of nothing but padding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from symphony_vlm.data.conversation import IGNORE_INDEX

__all__ = ["PaddedDataset", "placeholder_like"]


def placeholder_like(item: Any, pad_token_id: int) -> Any:
    """A placeholder with the fields of a data set's item.

    Args:
        item: an `EncodedSample`, a list of them (a packed row), or ``{input_ids, labels}`` of a text block, whose
            length is kept.
        pad_token_id: the token that stands there.
    """
    if isinstance(item, list):
        return [placeholder_like(item[0], pad_token_id)]
    if isinstance(item["input_ids"], torch.Tensor):
        block = torch.full_like(item["input_ids"], pad_token_id)
        return {"input_ids": block, "labels": torch.full_like(block, IGNORE_INDEX)}
    ids = np.array([pad_token_id], dtype=item["input_ids"].dtype)
    return {**{key: [] for key in item}, "input_ids": ids, "labels": np.full_like(ids, IGNORE_INDEX)}


class PaddedDataset(Dataset[Any]):
    """A data set with placeholders at its end, so that its length is a multiple of a number.

    Without them the Trainer would give some records a second time, to fill the last batches of all processes.

    Args:
        dataset: any map-style data set.
        multiple: records that all processes take together, at least.
        pad_token_id: see `placeholder_like`.
    """

    def __init__(self, dataset: Dataset[Any], *, multiple: int, pad_token_id: int) -> None:
        self._dataset = dataset
        self._num_real = len(dataset)  # type: ignore[arg-type]
        self._length = -(-self._num_real // multiple) * multiple
        self._placeholder = placeholder_like(dataset[0], pad_token_id)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index] if index < self._num_real else self._placeholder
