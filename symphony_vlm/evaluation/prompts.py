"""Prompts of a batch. Those about the same pictures are read together up to their questions.

A prompt is instructions and pictures, which take hundreds of tokens, and then a question of a dozen. What stands up to
the last picture's end is equal for all questions about it, and no token there sees the question: it is read once for
each picture, its keys and values are repeated for the questions, and of each prompt the rest alone is left to read.

Shape letters: B prompts, S longest prompt.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from symphony_vlm.data.sample import Message
from symphony_vlm.model.merge import position_ids_from_mask
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["Prompts", "can_share_prefixes", "order_by_picture", "read_prompts"]

Features = Sequence[Sequence[Tensor] | None]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts that end with a question, ready for the model."""

    inputs: dict[str, Tensor]
    """``input_ids``, ``attention_mask``, ``position_ids``, ``[B, S]``. Padding stands in front of what it makes longer:
    a prompt, or what has been read of it, or the rest."""
    images: list[Tensor]
    """Features of the pictures that are still to be read, in order."""
    cache: Cache | None = None
    """What has been read, equally many places of each prompt."""

    @property
    def for_generate(self) -> dict[str, Any]:
        """Arguments of ``generate``, which takes the whole prompts."""
        cached = {} if self.cache is None else {"past_key_values": self.cache}
        return {**self.inputs, **cached, "image_features": self.images or None}

    @property
    def for_forward(self) -> dict[str, Any]:
        """Arguments of a forward pass over what is still to be read; the mask covers everything."""
        start = 0 if self.cache is None else self.cache.get_seq_length()
        rest = {name: self.inputs[name][:, start:] for name in ("input_ids", "position_ids")}
        return {**self.for_generate, **rest}


@torch.no_grad()
def read_prompts(
    model: SymphonyVLMForConditionalGeneration,
    conversations: Sequence[Sequence[Message]],
    features: Features,
    *,
    share: bool,
) -> Prompts:
    """Encodes prompts, and reads what several have in common.

    Args:
        model: in evaluation mode, with its processor.
        conversations: each ends with a question.
        features: for each the features of its images in order, or None; the same tensors for the same pictures.
        share: whether to read common beginnings once, see `can_share_prefixes`.
    """
    processor = model.processor
    assert processor is not None
    counts = [None if images is None else [len(image) for image in images] for images in features]
    rows = [
        processor.encode(messages, generation_prompt=True, num_image_tokens=tokens).input_ids
        for messages, tokens in zip(conversations, counts, strict=True)
    ]
    shared = _shared_prefixes(rows, features, processor.image_token_id) if share else None
    if shared is not None:
        return _read_prefixes(model, rows, features, shared)
    present = [image for images in features for image in images or ()]
    return Prompts(inputs=_pad(model, rows), images=present)


class _Shared(NamedTuple):
    chosen: list[int]
    """For each of the different prefixes one prompt that has it."""
    of_prompt: list[int]
    """For each prompt the number of its prefix in `chosen`."""
    ends: list[int]
    """For each prompt the length of its prefix."""


def _shared_prefixes(rows: Sequence[list[int]], features: Features, image_token_id: int) -> _Shared | None:
    """Prompts up to the end of their last picture; None if no two are equal, or one has no picture."""
    if not all(features):
        return None
    ends = [len(row) - row[::-1].index(image_token_id) for row in rows]
    numbers: dict[Hashable, int] = {}
    chosen: list[int] = []
    of_prompt: list[int] = []
    for i, (row, images, end) in enumerate(zip(rows, features, ends, strict=True)):
        # By identity: features of pictures that only look alike are not compared.
        key = tuple(map(id, images or ())), tuple(row[:end])
        if key not in numbers:
            numbers[key] = len(chosen)
            chosen.append(i)
        of_prompt.append(numbers[key])
    return None if len(chosen) == len(rows) else _Shared(chosen, of_prompt, ends)


def _read_prefixes(
    model: SymphonyVLMForConditionalGeneration, rows: Sequence[list[int]], features: Features, shared: _Shared
) -> Prompts:
    before = _pad(model, [rows[i][: shared.ends[i]] for i in shared.chosen])
    images = [image for i in shared.chosen for image in features[i] or ()]
    cache = model(**before, image_features=images, use_cache=True, logits_to_keep=1).past_key_values
    places_B = torch.tensor(shared.of_prompt, device=model.device)
    cache.batch_select_indices(places_B)
    after = _pad(model, [row[end:] for row, end in zip(rows, shared.ends, strict=True)])
    inputs = {name: torch.cat([before[name][places_B], after[name]], dim=1) for name in ("input_ids", "attention_mask")}
    inputs["position_ids"] = position_ids_from_mask(inputs["attention_mask"])
    return Prompts(inputs=inputs, images=[], cache=cache)


def _pad(model: SymphonyVLMForConditionalGeneration, rows: Sequence[list[int]]) -> dict[str, Tensor]:
    assert model.processor is not None
    return {name: tensor.to(model.device) for name, tensor in model.processor.pad_prompts(rows).items()}


_LEARNED_POSITIONS = ("gpt2", "gpt_bigcode")
_ROTARY_BY_LENGTH = ("dynamic", "longrope")


def can_share_prefixes(model: SymphonyVLMForConditionalGeneration) -> bool:
    """Whether a cache can be repeated, and padding may stand between it and the rest of a prompt.

    The latter needs a language model to which a token's position is a number that it is told. Sliding windows and
    ALiBi count places, padding or not; some rotary embeddings depend on the length of the whole.
    """
    config = model.config.get_text_config(decoder=True)
    rotary = getattr(config, "rope_parameters", None) or {}
    told = config.model_type in _LEARNED_POSITIONS or (bool(rotary) and not getattr(config, "alibi", False))
    layers = DynamicCache(config=config).layers
    return (
        told
        and rotary.get("rope_type") not in _ROTARY_BY_LENGTH
        and all(type(layer) is DynamicLayer for layer in layers)
    )


def order_by_picture(pictures: Sequence[Hashable], lengths: Sequence[int]) -> list[int]:
    """An order of prompts in which batches have little padding and the questions about a picture stand together.

    Args:
        pictures: equal for prompts about the same pictures.
        lengths: grow with the lengths of the prompts.
    """
    longest: dict[Hashable, int] = {}
    for picture, length in zip(pictures, lengths, strict=True):
        longest[picture] = max(length, longest.get(picture, 0))
    place = {picture: n for n, picture in enumerate(sorted(longest, key=lambda picture: longest[picture]))}
    return sorted(range(len(lengths)), key=lambda i: (place[pictures[i]], lengths[i]))
