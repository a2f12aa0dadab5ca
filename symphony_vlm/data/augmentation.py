"""Corrupts some of the pictures that a stage trains on. The same ones however many workers and processes there are."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from symphony_vlm.corruptions import corrupt, corruption_rng, image_key
from symphony_vlm.data.images import image_bytes
from symphony_vlm.data.sample import ImageRef

__all__ = ["Augmentation"]


@dataclass
class Augmentation:
    """What happens to a picture depends on its content, the seed and the epoch alone.

    So a continued run finds the same pixels, and records that share a picture share what became of it.
    """

    corruptions: tuple[str, ...]
    """Each as likely as the others."""
    severities: tuple[int, ...]
    """Likewise."""
    probability: float
    """That a picture is corrupted."""
    seed: int
    epoch: int = field(default=0)
    """Of a stream: how often the source had been read to its end before."""

    def set_epoch(self, epoch: int) -> None:
        """Chooses what pictures become from now on."""
        self.epoch = epoch

    def __call__(self, ref: ImageRef, image: Image.Image) -> Image.Image:
        """The picture, corrupted or as it is.

        Args:
            ref: where it is from; its encoded bytes are the generator's key.
            image: RGB, as decoded.

        Raises:
            InputError: it is ``frost``'s turn and its textures are not there.
        """
        # A name of its own: the draws are not those of an evaluation with the same seed.
        rng = corruption_rng(image_key(image_bytes(ref)), "augmentation", self.epoch, self.seed)
        if rng.random() >= self.probability:
            return image
        name = self.corruptions[int(rng.integers(0, len(self.corruptions)))]
        severity = self.severities[int(rng.integers(0, len(self.severities)))]
        return Image.fromarray(corrupt(np.asarray(image), name, severity, rng))
