"""Fills the cache of a frozen vision tower's features before a stage, and serves the pictures of a data set from it.

Shape letters: N pictures, R rows (one per picture, or per tile), P features per row, C vision hidden size.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor

from symphony_vlm.data.feature_cache import FeatureCache
from symphony_vlm.data.images import image_bytes, image_key, load_image
from symphony_vlm.data.sample import ImageRef, Sample
from symphony_vlm.errors import InputError
from symphony_vlm.model.image_processor import SymphonyImageProcessor
from symphony_vlm.model.vision import VisionTower

__all__ = ["CachedFeatures", "encoder_key", "fill_feature_cache"]

VERSION = 1
"""Of the cache's layout and of what enters the keys."""
SHARD_BYTES = 256 * 2**20
BATCH = 32


class CachedFeatures:
    """Features by image reference.

    Args:
        cache: of the stage's encoder.
        keys: sha256 of the bytes by `image_key`.
    """

    def __init__(self, cache: FeatureCache, keys: dict[str, bytes]) -> None:
        self._cache = cache
        self._keys = keys

    def __call__(self, ref: ImageRef) -> tuple[Tensor, tuple[int, int]]:
        """``[R, P, C]`` of one picture, and its height and width."""
        return self._cache[self._keys[image_key(ref)]]


def encoder_key(tower: VisionTower, processor: SymphonyImageProcessor) -> str:
    """A name for everything that features depend on: weights, their type, configuration, image preparation."""
    settings = {"version": VERSION, "tower": tower.config.to_dict(), "processor": processor.to_dict()}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # Seen as bytes, since numpy knows no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def fill_feature_cache(
    tower: VisionTower,
    processor: SymphonyImageProcessor,
    samples: Sequence[Sequence[Sample]],
    folder: Path,
    console: Console,
    *,
    load: Callable[[ImageRef], Image.Image] = load_image,
) -> CachedFeatures:
    """Encodes every picture of the samples that the cache does not hold yet; processes divide them.

    Args:
        tower: frozen; on its device.
        processor: prepares the images for it.
        samples: lists of samples.
        folder: holds a folder per encoder.
        console: for progress.
        load: opens an image.

    Raises:
        InputError: a picture cannot be read, or the features would fill the disk.
    """
    processes = PartialState()
    cache = FeatureCache(folder / encoder_key(tower, processor))
    # References rather than pixels; every process makes the same list and hashes the files once.
    refs = {image_key(ref): ref for part in samples for i in range(len(part)) for ref in part[i].images}
    keys = {name: hashlib.sha256(image_bytes(ref)).digest() for name, ref in refs.items()}
    by_content = {key: refs[name] for name, key in keys.items()}
    missing = [key for key in by_content if key not in cache]
    processes.wait_for_everyone()  # nobody writes before all have made the list
    if missing:
        mine = missing[processes.process_index :: processes.num_processes]
        was_training = tower.training
        tower.eval()
        try:
            encode = partial(_features, tower, processor, load)
            _encode(encode, [(key, by_content[key]) for key in mine], len(missing), cache, console)
        finally:
            tower.train(was_training)
        processes.wait_for_everyone()
        cache.refresh()
    return CachedFeatures(cache, keys)


def _encode(
    encode: Callable[[Sequence[ImageRef]], tuple[list[Tensor], list[tuple[int, int]]]],
    pictures: Sequence[tuple[bytes, ImageRef]],
    num_missing: int,
    cache: FeatureCache,
    console: Console,
) -> None:
    keys: list[bytes] = []
    features: list[Tensor] = []
    sizes: list[tuple[int, int]] = []
    columns = ("[bold]{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    if not console.is_terminal:
        console.print(f"encoding {num_missing} pictures into {cache.folder.parent}", markup=False)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("encoding pictures", total=len(pictures))
        for batch in _batches(pictures):
            encoded, their_sizes = encode([ref for _, ref in batch])
            if not features:
                _check_space(cache.folder, encoded[0], num_missing)
            keys += [key for key, _ in batch]
            features += encoded
            sizes += their_sizes
            bar.advance(task, len(batch))
            if sum(rows.nbytes for rows in features) >= SHARD_BYTES:
                cache.add(keys, features, sizes)
                keys, features, sizes = [], [], []
    if keys:
        cache.add(keys, features, sizes)


def _batches(pictures: Sequence[tuple[bytes, ImageRef]]) -> Iterator[Sequence[tuple[bytes, ImageRef]]]:
    for start in range(0, len(pictures), BATCH):
        yield pictures[start : start + BATCH]


@torch.no_grad()
def _features(
    tower: VisionTower,
    processor: SymphonyImageProcessor,
    load: Callable[[ImageRef], Image.Image],
    refs: Sequence[ImageRef],
) -> tuple[list[Tensor], list[tuple[int, int]]]:
    parameter = next(tower.parameters())
    images = [load(ref) for ref in refs]
    sizes = [(image.height, image.width) for image in images]
    pixels = processor(images)["pixel_values"].to(parameter.device, parameter.dtype)
    # As many tiles at once as pictures are: of large pictures a batch could be gigabytes.
    features_RPC = torch.cat([tower(part).cpu() for part in pixels.split(BATCH)])
    grid = processor.tile_grid
    rows = [1 if grid is None else grid.num_tiles(size) for size in sizes]
    return list(features_RPC.split(rows)), sizes


def _check_space(folder: Path, first: Tensor, num_pictures: int) -> None:
    needed, free = first.nbytes * num_pictures, shutil.disk_usage(folder).free
    if needed > 0.9 * free:
        raise InputError(
            f"the features of {num_pictures:,} pictures need about {needed / 2**30:,.1f} GiB; "
            f"{free / 2**30:,.1f} GiB are free",
            where=str(folder),
            remedy="Set data.feature_cache to a folder on a larger disk, or cache_features: false.",
        )
