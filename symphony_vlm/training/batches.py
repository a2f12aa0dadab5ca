"""How a multimodal stage makes batches of its samples: at random, grouped, or packed."""

from __future__ import annotations

from collections.abc import Callable, Sized
from functools import partial

from accelerate import PartialState

from symphony_vlm.config.recipe import StageConfig
from symphony_vlm.data.collator import ConversationDataset
from symphony_vlm.data.grouping import EpochSampler, Order, length_order, modality_length_order, random_order
from symphony_vlm.data.packing import PackedDataset

__all__ = ["grouped_sampler", "pack", "random_sampler"]


def pack(
    dataset: ConversationDataset, stage: StageConfig, *, seed: int, report: Callable[[str], None] | None = None
) -> PackedDataset:
    """Packs a stage's samples into rows of at most its `max_length` tokens.

    Args:
        dataset: the samples, every one of which is tokenised here.
        stage: its settings.
        seed: of the run.
        report: gets one line about the result.
    """
    packed = PackedDataset(dataset, max_length=stage.max_length, seed=seed)
    if report is not None and len(packed):
        report(
            f"{stage.name}: {len(dataset)} conversations in {len(packed)} rows of at most {stage.max_length} tokens, "
            f"{len(dataset) / len(packed):.1f} in each, {packed.filled:.1%} filled"
        )
    return packed


def random_sampler(dataset: Sized, *, seed: int) -> EpochSampler:
    """A random order of any samples."""
    return EpochSampler(partial(random_order, len(dataset)), len(dataset), seed=seed)


def grouped_sampler(dataset: ConversationDataset, stage: StageConfig, *, seed: int) -> EpochSampler:
    """The order of a stage's training samples by its `group_by`."""
    lengths = [dataset.num_tokens(index) for index in range(len(dataset))]
    num_batches = stage.gradient_accumulation_steps * PartialState().num_processes
    order: Order
    if stage.group_by == "length":
        order = partial(length_order, lengths, stage.batch_size * num_batches)
    else:
        has_image = [dataset.has_image(index) for index in range(len(dataset))]
        order = partial(modality_length_order, lengths, has_image, stage.batch_size, num_batches)
    return EpochSampler(order, len(dataset), seed=seed)
