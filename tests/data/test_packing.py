"""Best fit, and batches of packed rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from symphony_vlm.data.collator import ConversationCollator, EncodedSample
from symphony_vlm.data.packing import PackedCollator, PackedDataset, pack_best_fit
from symphony_vlm.errors import InputError

PAD = 9


def _naive(lengths: list[int], capacity: int, seed: int) -> list[list[int]]:
    """Best fit as it is defined: look at every pack, the latest first, and take one with the least sufficient room."""
    packs: list[list[int]] = []
    touched: list[int] = []
    for item in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        rooms = [(capacity - sum(lengths[i] for i in pack), -touched[n], n) for n, pack in enumerate(packs)]
        fitting = [entry for entry in rooms if entry[0] >= lengths[item]]
        if fitting:
            chosen = min(fitting)[2]
            packs[chosen].append(item)
        else:
            chosen = len(packs)
            packs.append([item])
            touched.append(0)
        touched[chosen] = max(touched) + 1
    return packs


LENGTHS = st.lists(st.integers(1, 20), max_size=60)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(20, 50), st.integers(0, 5))
def test_it_is_best_fit(lengths: list[int], capacity: int, seed: int) -> None:
    packs = pack_best_fit(lengths, capacity, seed=seed)
    assert packs == _naive(lengths, capacity, seed)
    assert sorted(item for pack in packs for item in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in pack) <= capacity for pack in packs)
    # Two packs that fit into one would never have been opened.
    fills = sorted(sum(lengths[i] for i in pack) for pack in packs)
    assert len(fills) < 2 or fills[0] + fills[1] > capacity


def test_the_seed_decides() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 200).tolist()
    assert pack_best_fit(lengths, 100, seed=1) == pack_best_fit(lengths, 100, seed=1)
    assert pack_best_fit(lengths, 100, seed=1) != pack_best_fit(lengths, 100, seed=2)


def test_many_conversations_fill_their_packs() -> None:
    """LLaVA-like: 576 image tokens and a tail of text. Of 2048 tokens, three such conversations leave some over."""
    generator = np.random.default_rng(0)
    lengths = (576 + generator.lognormal(4, 1, 20_000)).clip(20, 2048).astype(int).tolist()
    for capacity, filled in ((2048, 0.9), (8192, 0.96)):
        assert sum(lengths) / (capacity * len(pack_best_fit(lengths, capacity, seed=0))) > filled


def test_an_item_longer_than_a_pack_is_an_error() -> None:
    with pytest.raises(InputError, match="item 1 has 11 tokens, a pack 10"):
        pack_best_fit([3, 11], 10, seed=0)


class Conversations:
    """Samples of the given lengths, every token of which is the sample's number; every other one has an image."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.opened: list[int] = []

    def __len__(self) -> int:
        return len(self.lengths)

    def num_tokens(self, index: int) -> int:
        return self.lengths[index]

    def __getitem__(self, index: int) -> EncodedSample:
        self.opened.append(index)
        ids = np.full(self.lengths[index], index, dtype=np.int32)
        images = [np.full((2, 2, 3), index, dtype=np.uint8)] * (index % 2)
        return {"input_ids": ids, "labels": ids, "images": images}


def _packed(lengths: list[int], max_length: int) -> tuple[Conversations, Any]:
    conversations: Any = Conversations(lengths)
    return conversations, PackedDataset(conversations, max_length=max_length, seed=0)


def test_a_row_holds_the_conversations_of_a_pack_and_none_is_opened_before() -> None:
    lengths = [3, 5, 4, 2, 6]
    conversations, packed = _packed(lengths, 10)
    assert conversations.opened == []
    assert packed.num_samples == 5 and len(packed) == 2 and packed.filled == 1.0
    packs = pack_best_fit(lengths, 10, seed=0)
    for row, pack in zip([packed[0], packed[1]], packs, strict=True):
        assert [int(sample["input_ids"][0]) for sample in row] == pack


def _normalize(squares: list[np.ndarray]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(square).permute(2, 0, 1).float() for square in squares])


def test_a_batch_of_packed_rows_by_hand() -> None:
    conversations = Conversations([2, 3, 1, 2])
    collate = PackedCollator(ConversationCollator(PAD, _normalize))
    batch = collate([[conversations[1], conversations[0], conversations[3]], [conversations[2]]])
    assert batch["input_ids"].tolist() == [[1, 1, 1, 0, 0, 3, 3], [2, PAD, PAD, PAD, PAD, PAD, PAD]]
    # The first token of a conversation is predicted by nothing.
    assert batch["labels"].tolist() == [[-100, 1, 1, -100, 0, -100, 3], [-100] * 7]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 1, 2, 2], [0, -1, -1, -1, -1, -1, -1]]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1, 3]
    assert batch.keys() == {"input_ids", "labels", "document_ids", "pixel_values"}


def test_samples_are_not_changed_by_packing_them() -> None:
    sample = Conversations([4])[0]
    PackedCollator(ConversationCollator(PAD, _normalize))([[sample]])
    assert sample["labels"].tolist() == [0] * 4


def test_packs_without_any_image_have_no_pixels() -> None:
    conversations = Conversations([2, 3, 4])
    collate = PackedCollator(ConversationCollator(PAD, _normalize))
    assert "pixel_values" not in collate([[conversations[0], conversations[2]]])
