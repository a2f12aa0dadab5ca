"""Models with one and the same frozen vision tower encode a picture once for all of them.

Models that were trained from the same start differ in the language model, its routers and perhaps the projector; the
tower's features are then the same numbers, and only what comes after them is computed for each model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from symphony_vlm.evaluation.opening import OpenedModel
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
from symphony_vlm.moe.layer import SparseMoE
from symphony_vlm.moe.precision import computing_dtype

__all__ = ["SharedEncoder", "share_encoders"]


class SharedEncoder:
    """The vision tower of several models. What it has made of a picture is kept until `forget`.

    Args:
        model: whose tower and image processor are used; those of the others are equal.
        batch_size: pictures encoded together.
    """

    def __init__(self, model: SymphonyVLMForConditionalGeneration, *, batch_size: int) -> None:
        assert model.processor is not None
        self._model = model
        self._prepare = model.processor.image_processor
        self._batch_size = batch_size
        self._features: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.num_encoded = 0
        """Pictures that have been through the tower."""

    def features(self, images: Sequence[np.ndarray]) -> tuple[Tensor, Tensor | None]:
        """The arguments of the model's ``project_image_features`` for uint8 ``[H, W, 3]`` images.

        Returns:
            Features ``[T, P, C]`` of the images' tiles, one after the other, and where images become tiles their
            sizes ``[N, 2]``.
        """
        keys = [_key(image) for image in images]
        missing = {key: image for key, image in zip(keys, images, strict=True) if key not in self._features}
        names = list(missing)
        for start in range(0, len(names), self._batch_size):
            self._encode({name: missing[name] for name in names[start : start + self._batch_size]})
        found = [self._features[key] for key in keys]
        sizes = [size for _, size in found if size is not None]
        return torch.cat([features for features, _ in found]), torch.cat(sizes) if sizes else None

    @torch.no_grad()
    def _encode(self, images: dict[str, np.ndarray]) -> None:
        inputs = self._prepare(list(images.values())).to(self._model.device)
        tower = self._model.vision_tower
        features_TPC = tower(inputs["pixel_values"].to(computing_dtype(tower)))
        sizes, grid = inputs.get("image_sizes"), self._model.tile_grid
        counts = [1] * len(images)
        if grid is not None:
            counts = [grid.num_tiles((height, width)) for height, width in sizes.tolist()]
        for i, (key, part) in enumerate(zip(images, features_TPC.split(counts), strict=True)):
            self._features[key] = part, None if sizes is None else sizes[i : i + 1]
        self.num_encoded += len(images)

    def forget(self) -> None:
        """Frees the features."""
        self._features.clear()


def share_encoders(
    models: Sequence[OpenedModel], labels: Sequence[str], *, batch_size: int, console: Console
) -> list[SharedEncoder | None]:
    """One encoder for all models whose tower's weights, its settings and the image processor are equal.

    Args:
        models: in memory, in evaluation mode.
        labels: what the log calls them.
        batch_size: pictures encoded together.
        console: where it is said which models share, and why others do not.

    Returns:
        For each model its encoder, or None: it encodes pictures itself.
    """
    if len(models) == 1:
        return [None]
    reasons = [_why_not(model) for model in models]
    names = [None if reason else _fingerprint(model) for model, reason in zip(models, reasons, strict=True)]
    encoders: dict[str, SharedEncoder] = {}
    for model, name in zip(models, names, strict=True):
        if name is not None and names.count(name) > 1 and name not in encoders:
            encoders[name] = SharedEncoder(model.model, batch_size=batch_size)
    for name in encoders:
        together = [label for label, other in zip(labels, names, strict=True) if other == name]
        console.print(f"{', '.join(together)}: one vision tower, whose features they share")
    for label, name, reason in zip(labels, names, reasons, strict=True):
        if name not in encoders:
            why = reason or "no other has its vision tower, settings and image processor"
            console.print(f"{label}: shares the pictures and encodes them itself ({why})")
    return [None if name is None else encoders.get(name) for name in names]


def _why_not(model: OpenedModel) -> str | None:
    if model.is_stock:
        return "a model of transformers"
    if any(isinstance(part, SparseMoE) for part in model.model.vision_tower.modules()):
        return "its vision tower has experts"
    return None


def _fingerprint(model: OpenedModel) -> str:
    """sha256 of all that the tower's features depend on: device, settings, preparation of images, every tensor."""
    tower = model.model.vision_tower
    prepare = model.processor.image_processor
    settings: list[Any] = [type(tower).__name__, str(model.model.device), tower.config.to_dict()]
    settings += [type(prepare).__name__, prepare.to_dict()]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    tensors = {**dict(tower.named_parameters()), **dict(tower.named_buffers())}
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _key(image: np.ndarray) -> str:
    return hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).hexdigest()
