"""From samples to padded batches.

Shape letters: B batch, S longest sequence, N images in the batch, T tiles of them (one an image, but with anyres).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from symphony_vlm.data.conversation import IGNORE_INDEX, EncodedConversation
from symphony_vlm.data.images import image_key, load_image
from symphony_vlm.data.sample import ImageRef, Sample

__all__ = ["ConversationCollator", "ConversationDataset", "EncodedSample", "turn_ids"]


class EncodedSample(TypedDict):
    """One sample ready for the collator."""

    input_ids: np.ndarray
    labels: np.ndarray
    images: list[Any]
    """Prepared images in placeholder order: uint8 squares, or the tiles of an image, ``[tiles, size, size, 3]``; or,
    from a cache of a frozen tower, features ``[tiles, P, C]``."""
    image_sizes: list[tuple[int, int]]
    """Height and width of each image before it was prepared."""


class ConversationDataset(Dataset[EncodedSample]):
    """Samples, encoded when first asked for.

    Args:
        samples: any sequence of samples.
        encode: tokenises one sample.
        to_square: the geometric part of image preparation, to a uint8 ``[size, size, 3]`` or
            ``[tiles, size, size, 3]`` array.
        load: opens an image.
        features: a frozen tower's features of an image and its height and width, instead of preparing it.
        augment: changes an opened image, each epoch otherwise, so that prepared images are not kept.
        cache_bytes: how much memory prepared images and tokens may take; later epochs read them from there.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        encode: Callable[[Sample], EncodedConversation],
        to_square: Callable[[Any], np.ndarray],
        load: Callable[[ImageRef], Image.Image] = load_image,
        features: Callable[[ImageRef], tuple[Tensor, tuple[int, int]]] | None = None,
        augment: Callable[[ImageRef, Image.Image], Image.Image] | None = None,
        cache_bytes: int = 2**30,
    ) -> None:
        self._samples = samples
        self._encode = encode
        self._to_square = to_square
        self._load = load
        self._features = features or self._square
        self._augment = augment
        self._budget = cache_bytes
        self._images: dict[str, np.ndarray] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._tokens: dict[int, tuple[np.ndarray, np.ndarray, tuple[int, ...]]] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> EncodedSample:
        sample = self._samples[index]
        ids, labels, order = self._encoded(index, sample)
        prepared = [self._features(sample.images[i]) for i in order]
        images, sizes = [image for image, _ in prepared], [size for _, size in prepared]
        return {"input_ids": ids, "labels": labels, "images": images, "image_sizes": sizes}

    def num_tokens(self, index: int) -> int:
        """How many tokens a sample has, images included. No image is opened."""
        return len(self._encoded(index, self._samples[index])[0])

    def has_image(self, index: int) -> bool:
        """Whether an image stands in a sample's text. It is not opened."""
        return len(self._encoded(index, self._samples[index])[2]) > 0

    def _encoded(self, index: int, sample: Sample) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
        if index not in self._tokens:
            encoded = self._encode(sample)
            ids, labels = (np.asarray(row, dtype=np.int32) for row in (encoded.input_ids, encoded.labels))
            if not self._take(2 * ids.nbytes):
                return ids, labels, encoded.image_order
            self._tokens[index] = (ids, labels, encoded.image_order)
        return self._tokens[index]

    def _square(self, ref: ImageRef) -> tuple[np.ndarray, tuple[int, int]]:
        if self._augment is not None:
            image = self._augment(ref, self._load(ref))
            return self._to_square(image), (image.height, image.width)
        key = image_key(ref)
        if key not in self._images:
            image = self._load(ref)
            square, size = self._to_square(image), (image.height, image.width)
            if not self._take(square.nbytes):
                return square, size
            self._images[key], self._sizes[key] = square, size
        return self._images[key], self._sizes[key]

    def _take(self, num_bytes: int) -> bool:
        if self._budget < num_bytes:
            return False
        self._budget -= num_bytes
        return True


@dataclass(frozen=True)
class ConversationCollator:
    """Right-pads ids and labels and stacks the images of all samples in reading order."""

    pad_token_id: int
    normalize: Callable[[list[np.ndarray]], Tensor]
    """Prepared images to ``[T, 3, H, W]``."""
    independent_turns_after: int | None = None
    """The image token, if the turns after a record's image are separate questions; see `turn_ids`."""
    no_features: Tensor | None = None
    """``[0, P, C]``, if images come as features of a frozen tower. Batches without an image hold it, so that all
    processes know of a stage that its tower does not run."""

    def __call__(self, samples: Sequence[EncodedSample]) -> dict[str, Tensor]:
        """``input_ids``, ``labels``, ``attention_mask`` ``[B, S]`` and, if there are images, ``pixel_values``.

        Where the images are tiles also ``image_sizes`` ``[N, 2]``.
        With independent turns also ``turn_ids`` ``[B, S]``. With a cache of features ``vision_features``
        ``[T, P, C]`` in the place of ``pixel_values``.
        """
        longest = max(len(sample["input_ids"]) for sample in samples)
        ids = torch.full((len(samples), longest), self.pad_token_id, dtype=torch.long)
        labels = torch.full_like(ids, IGNORE_INDEX)
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(samples):
            length = len(sample["input_ids"])
            ids[row, :length] = torch.from_numpy(sample["input_ids"])
            labels[row, :length] = torch.from_numpy(sample["labels"])
            mask[row, :length] = 1
        batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        if self.independent_turns_after is not None:
            batch["turn_ids"] = turn_ids(ids, labels, self.independent_turns_after)
        images = [image for sample in samples for image in sample["images"]]
        cached = self.no_features is not None
        if self.no_features is not None:
            batch["vision_features"] = torch.cat([self.no_features, *images])
        elif images:
            batch["pixel_values"] = self.normalize(images)
        if images and (cached or images[0].ndim == 4):
            batch["image_sizes"] = torch.tensor([size for sample in samples for size in sample["image_sizes"]])
        return batch


def turn_ids(input_ids_BS: Tensor, labels_BS: Tensor, image_token_id: int) -> Tensor:
    """Which turn each token belongs to, ``[B, S]``: 0, 1, ... and -1 for what all turns share.

    A turn ends with its supervised answer. Shared is the beginning of the first turn up to its last image token; a
    record without an image there shares nothing.
    """
    supervised_BS = labels_BS != IGNORE_INDEX
    last_of_answer_BS = supervised_BS & ~torch.nn.functional.pad(supervised_BS[:, 1:], (0, 1))
    turns_BS = last_of_answer_BS.long().cumsum(1) - last_of_answer_BS.long()
    first_images_BS = (input_ids_BS == image_token_id) & (turns_BS == 0)
    # From here on to the left there is an image token of the first turn.
    shared_BS = first_images_BS.long().flip(1).cumsum(1).flip(1) > 0
    return turns_BS.masked_fill(shared_BS, -1)
