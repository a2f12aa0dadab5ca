"""Orders of samples: what LLaVA's grouping promises, one seed for everything, the same on every process."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from symphony_vlm.data.grouping import EpochSampler, deal_evenly, length_order, modality_length_order

BATCH, BATCHES = 4, 6
MEGA = BATCH * BATCHES


def _data(num_images: int = 317, num_texts: int = 145, seed: int = 0) -> tuple[list[int], list[bool]]:
    generator = np.random.default_rng(seed)
    has_image = generator.permutation([True] * num_images + [False] * num_texts)
    lengths = np.where(has_image, 60, 0) + generator.lognormal(3, 1, len(has_image)).clip(1, 400)
    return lengths.astype(int).tolist(), has_image.tolist()


def _order(seed: int = 0, data: tuple[list[int], list[bool]] | None = None) -> list[int]:
    lengths, has_image = data or _data()
    return modality_length_order(lengths, has_image, BATCH, BATCHES, torch.Generator().manual_seed(seed))


def _oracle(lengths: list[int], has_image: list[bool], generator: torch.Generator) -> list[int]:
    """The description in loops: two lists, permuted, cut, dealt to the shortest, shuffled, the last ones appended."""
    images, texts = ([i for i in range(len(lengths)) if has_image[i] == kind] for kind in (True, False))
    megas: list[list[int]] = []
    rest: list[int] = []
    for members in (images, texts):
        members = [members[p] for p in torch.randperm(len(members), generator=generator).tolist()]
        pieces = [members[a : a + MEGA] for a in range(0, len(members), MEGA)]
        for number, piece in enumerate(pieces):
            piece = sorted(piece, key=lambda i: -lengths[i])
            chunks: list[list[int]] = [[] for _ in range(BATCHES)]
            for turn, index in enumerate(piece):
                if len(piece) % BATCHES:
                    chunks[turn % BATCHES].append(index)
                else:
                    free = [c for c in chunks if len(c) < len(piece) / BATCHES]
                    min(free, key=lambda c: sum(lengths[i] for i in c)).append(index)
            dealt = list(itertools.chain.from_iterable(chunks))
            if number < len(pieces) - 1:
                megas.append(dealt)
            else:
                rest += dealt
    shuffled = [megas[p] for p in torch.randperm(len(megas), generator=generator).tolist()]
    return [*itertools.chain.from_iterable(shuffled), *rest]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 3))
def test_it_is_the_description_in_loops_and_every_sample_comes_once(images: int, texts: int, seed: int) -> None:
    data = _data(images, texts, seed)
    order = _order(seed, data)
    assert order == _oracle(*data, torch.Generator().manual_seed(seed))
    assert sorted(order) == list(range(images + texts))


def test_batches_have_one_modality_but_for_the_remainder() -> None:
    _, has_image = _data()
    order = _order()
    remainder = 317 % MEGA + 145 % MEGA
    assert remainder == 6
    kinds = [{has_image[i] for i in order[a : a + BATCH]} for a in range(0, len(order) - remainder, BATCH)]
    assert all(len(kind) == 1 for kind in kinds)
    # Both kinds come from the beginning on, in random order, not one after the other.
    changes = sum(a != b for a, b in itertools.pairwise(kinds))
    assert changes > 5


def test_the_batches_of_a_step_have_nearly_equal_numbers_of_tokens() -> None:
    """Dealing to the shortest: no more apart than the longest sample; at random they are several times as far."""
    lengths, _ = _data()
    spreads = []
    for order in (_order(), np.random.default_rng(0).permutation(len(lengths)).tolist()):
        totals = [sum(lengths[i] for i in order[a : a + BATCH]) for a in range(0, len(order) - MEGA, BATCH)]
        steps = [totals[a : a + BATCHES] for a in range(0, len(totals) - BATCHES, BATCHES)]
        spreads.append(float(np.mean([np.std(step) / np.mean(step) for step in steps])))
    assert spreads[0] < spreads[1] / 2


def test_incomplete_mega_batches_are_dealt_in_turn() -> None:
    assert deal_evenly([0, 1, 2, 3, 4], [5, 1, 4, 2, 3], 2) == [[0, 4, 1], [2, 3]]
    assert deal_evenly([0, 1, 2, 3], [9, 4, 3, 1], 2) == [[0, 3], [1, 2]]


def test_only_the_generator_decides() -> None:
    """LLaVA hands its generator to one of three draws; the others follow whatever random state there is."""
    torch.manual_seed(1)
    first = _order()
    torch.manual_seed(2)
    assert _order() == first != _order(seed=1)


def _padding(order: list[int], lengths: list[int], batch: int) -> float:
    rows = [[lengths[i] for i in order[a : a + batch]] for a in range(0, len(order), batch)]
    return 1 - sum(lengths) / sum(max(row) * len(row) for row in rows)


def test_length_order_leaves_little_padding_and_uses_true_lengths() -> None:
    lengths, _ = _data(3000, 1000)
    order = length_order(lengths, MEGA, torch.Generator().manual_seed(0))
    assert sorted(order) == list(range(len(lengths)))
    at_random = _padding(np.random.default_rng(0).permutation(len(lengths)).tolist(), lengths, BATCH)
    assert _padding(order, lengths, BATCH) < at_random / 4
    assert lengths[order[0]] == max(lengths), "the longest comes first, so that a lack of memory shows at once"
    torch.manual_seed(5)
    assert length_order(lengths, MEGA, torch.Generator().manual_seed(0)) == order


def _sampler(seed: int = 0) -> EpochSampler:
    lengths, has_image = _data()
    return EpochSampler(partial(modality_length_order, lengths, has_image, BATCH, BATCHES), len(lengths), seed=seed)


def test_an_epoch_has_its_order_whenever_it_is_asked_for() -> None:
    sampler = _sampler()
    orders = []
    for epoch in (0, 1, 0, 2):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2]
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != list(_sampler(seed=1))
    # Seeds and epochs do not stand for one another.
    other = _sampler(seed=1)
    assert orders[1] != list(other)


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_an_epoch_and_a_continued_one_goes_on_where_it_was(processes: int, epoch: int) -> None:
    """As the Trainer's loaders do it, with accelerate's shards and its skipping of batches already seen."""
    lengths, has_image = _data()

    def open_loader(process: int) -> tuple[EpochSampler, Any]:
        sampler = _sampler()
        loader = DataLoader(list(range(len(lengths))), batch_size=BATCH, sampler=sampler, collate_fn=list)
        return sampler, prepare_data_loader(loader, num_processes=processes, process_index=process, put_on_device=False)

    batches: list[list[list[int]]] = []
    for process in range(processes):
        _, loader = open_loader(process)
        loader.set_epoch(epoch)
        batches.append(list(loader))
        sampler, loader = open_loader(process)
        continued = skip_first_batches(loader, 5)
        # What `training.trainer.EpochOrder` is for: of several processes the loader does not reach the sampler.
        sampler.set_epoch(epoch)
        continued.set_epoch(epoch)
        assert list(continued) == batches[-1][5:]
    expected = _sampler()
    expected.set_epoch(epoch)
    order = list(expected)
    assert len(batches[0]) == math.ceil(math.ceil(len(order) / BATCH) / processes)
    seen = [i for step in zip(*batches, strict=True) for batch in step for i in batch]
    # accelerate fills the last batches up with samples from the beginning.
    assert seen[: len(order)] == order
    for step in list(zip(*batches, strict=True))[:-2]:
        assert all(len({has_image[i] for i in batch}) == 1 for batch in step)
