"""The order in which a stage sees its samples: at random, grouped by length, or by modality and length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

__all__ = ["EpochSampler", "Order", "deal_evenly", "length_order", "modality_length_order", "random_order"]

Order = Callable[[torch.Generator], list[int]]
"""An order of all samples, from a random state."""


class EpochSampler(Sampler[int]):
    """Goes through the samples in an order of its own each epoch.

    The order is a function of seed and epoch: every continued run and any number of processes find the same, so that
    an optimizer step has the same samples whoever computes it. That is what the Trainer's own orders lack: one depends
    on what else has drawn random numbers, the others on how many samples fill up the last batches.

    Args:
        order: makes an epoch's order.
        num_samples: how many samples it orders.
        seed: of the run.
        padded_to: how many samples an epoch has with the placeholders at its end (`placeholders.PaddedDataset`).
    """

    def __init__(self, order: Order, num_samples: int, *, seed: int, padded_to: int | None = None) -> None:
        self._order = order
        self._num_samples = num_samples
        self._placeholders = range(num_samples, padded_to or num_samples)
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_samples + len(self._placeholders)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1000003 * self._seed + self._epoch)
        return iter([*self._order(generator), *self._placeholders])

    def padded(self, padded_to: int) -> EpochSampler:
        """The same order with placeholders at its end."""
        return EpochSampler(self._order, self._num_samples, seed=self._seed, padded_to=padded_to)


def random_order(num_samples: int, generator: torch.Generator) -> list[int]:
    """A permutation."""
    order: list[int] = torch.randperm(num_samples, generator=generator).tolist()
    return order


def length_order(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[int]:
    """Batches of nearly equal length: transformers' order for ``group_by_length``, with a generator that is used.

    Samples are permuted, cut into pieces of up to 50 batches, and sorted within each, longest first.

    Args:
        lengths: tokens of each sample.
        batch_size: samples of an optimizer step.
        generator: random state.
    """
    from transformers.trainer_pt_utils import get_length_grouped_indices

    order: list[int] = get_length_grouped_indices(list(lengths), batch_size, generator=generator)
    return order


def modality_length_order(
    lengths: Sequence[int], has_image: Sequence[bool], batch_size: int, num_batches: int, generator: torch.Generator
) -> list[int]:
    """Batches of one modality, as LLaVA-1.5 trains (``group_by_modality_length``, haotian-liu/LLaVA c121f04).

    Samples with and without an image are permuted apart and cut into mega-batches, one for each optimizer step. A
    mega-batch is dealt, longest first, into batches whose lengths add up to nearly the same, so that no process waits
    for another. The mega-batches of both modalities are shuffled together but for the last of each: they stand, first
    that with images, at the end, and there alone a batch can hold both.

    Args:
        lengths: tokens of each sample.
        has_image: whether each sample has an image.
        batch_size: samples of a process's micro-batch.
        num_batches: micro-batches of an optimizer step, over all processes.
        generator: random state, the only one.
    """
    kinds = [[i for i, image in enumerate(has_image) if bool(image) == kind] for kind in (True, False)]
    shuffled, last = [], []
    for indices in kinds:
        permuted = [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]
        size = batch_size * num_batches
        mega_batches = [permuted[i : i + size] for i in range(0, len(permuted), size)]
        dealt = [
            [i for batch in deal_evenly(mega_batch, lengths, num_batches) for i in batch] for mega_batch in mega_batches
        ]
        shuffled += dealt[:-1]
        last += dealt[-1:]
    order = [shuffled[i] for i in torch.randperm(len(shuffled), generator=generator).tolist()]
    return [i for mega_batch in [*order, *last] for i in mega_batch]


def deal_evenly(indices: Sequence[int], lengths: Sequence[int], num_batches: int) -> list[list[int]]:
    """Deals samples, longest first, each to the batch with the fewest tokens that is not full.

    Args:
        indices: of the samples; where they do not make equal batches they are dealt in turn.
        lengths: tokens of every sample of the data.
        num_batches: how many batches.
    """
    longest_first = sorted(indices, key=lambda i: lengths[i], reverse=True)
    if len(indices) % num_batches:
        return [longest_first[i::num_batches] for i in range(num_batches)]
    batches: list[list[int]] = [[] for _ in range(num_batches)]
    totals = [0] * num_batches
    for index in longest_first:
        not_full = [b for b in range(num_batches) if len(batches[b]) < len(indices) // num_batches]
        shortest = min(not_full, key=lambda b: totals[b])
        batches[shortest].append(index)
        totals[shortest] += lengths[index]
    return batches
