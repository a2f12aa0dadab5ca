"""Batches from disk: pictures decoded and prepared, or their features from the cache, beside a loop as LLaVA has it.

Contenders on the same records, in batches of 16, by PyTorch's data loader with 0, 1 and 2 workers:

- ``LazySupervisedDataset``: as in LLaVA's train.py, written here in its manner: each record opened, padded to a square,
  prepared by transformers' CLIP processor, its conversation tokenised as a whole and every turn again for its labels;
- ``pictures``: this project's data set, which keeps nothing in memory here, as in a first epoch;
- ``cached features``: the same with a frozen tower's output, CLIP-L/14-336's in size, from the feature cache.

Times with workers are of the clock on the wall. The pages of the files are in the system's cache.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks.measure import Case, Plan, Work
from symphony_vlm.data.collator import ConversationCollator, ConversationDataset
from symphony_vlm.data.conversation import IGNORE_INDEX
from symphony_vlm.data.datasets import open_samples
from symphony_vlm.data.feature_cache import FeatureCache
from symphony_vlm.data.images import image_bytes, image_key
from symphony_vlm.data.sample import ImagePart, Sample
from symphony_vlm.data.scenes import generate_scenes
from symphony_vlm.data.templates import get_template
from symphony_vlm.data.tokenizer import IMAGE_TOKEN, train_tokenizer
from symphony_vlm.model.image_processor import SymphonyImageProcessor
from symphony_vlm.model.processor import SymphonyVLMProcessor
from symphony_vlm.model.vision import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from symphony_vlm.training.features import CachedFeatures

__all__ = ["PLAN", "cases"]

PLAN = Plan(rounds=1, alternations=3, seconds=0.0)

BATCH, SIZE, PATCHES, CHANNELS = 16, 336, 576, 1024
TEMPLATE = get_template("compact")


def cases(
    *, tiny: bool, device: torch.device, data: Path | None = None, image_folder: Path | None = None
) -> Iterator[Case]:
    """One pass over the records for each number of workers.

    Args:
        tiny: few records, for a test of the benchmark.
        device: nothing happens on it.
        data: a file of conversations; None: generated scenes of 480 pixels, with eight questions each.
        image_folder: base of its image paths.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if data is None:
            data = generate_scenes(folder / "scenes", train=16 if tiny else 96, test=1, image_size=480).train_json
        source = open_samples(data, image_folder=image_folder)
        chosen = np.random.default_rng(0).permutation(len(source)).tolist()
        samples = [sample for index in chosen if len((sample := source[index]).images) == 1][: 8 if tiny else 64]
        texts = [message.text for sample in samples for message in sample.messages]
        tokenizer = train_tokenizer(
            texts, vocab_size=4096, special_tokens=TEMPLATE.special_tokens, end_token=TEMPLATE.answer_end
        )
        loaders = _loaders(samples, tokenizer, folder)
        for workers in (0, 1) if tiny else (0, 1, 2):
            settings: dict[str, int | str] = {"workers": workers, "records": len(samples)}
            contenders = {name: _passes(*loader, workers) for name, loader in loaders.items()}
            items = ("samples", len(samples))
            yield Case(settings=settings, contenders=contenders, items=items, by_other_processes=workers > 0)


def _loaders(samples: Sequence[Sample], tokenizer: Any, folder: Path) -> dict[str, tuple[Dataset[Any], Any]]:
    """Data sets and collators by contender."""
    images = SymphonyImageProcessor(SIZE, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    processor = SymphonyVLMProcessor(images, tokenizer, PATCHES, template=TEMPLATE.name)
    ours = partial(
        ConversationDataset,
        samples,
        encode=lambda sample: processor.encode(sample.messages, origin=sample.origin),
        to_square=images.prepare,
        cache_bytes=0,
    )
    collate = partial(ConversationCollator, tokenizer.pad_token_id, images.normalize)
    none = torch.empty(0, PATCHES, CHANNELS, dtype=torch.bfloat16)
    return {
        "LazySupervisedDataset": (LazySupervisedDataset(samples, tokenizer), LazyCollator(tokenizer.pad_token_id)),
        "pictures": (ours(), collate()),
        "cached features": (ours(features=_features(samples, folder / "features")), collate(no_features=none)),
    }


def _passes(dataset: Dataset[Any], collate: Any, workers: int) -> Work:
    """A pass over all batches; returns how many tokens are supervised."""
    loader = DataLoader(
        dataset, batch_size=BATCH, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0
    )

    def run() -> Sequence[Tensor]:
        return (torch.stack([(batch["labels"] != IGNORE_INDEX).sum() for batch in loader]).sum(),)

    return run


def _features(samples: Sequence[Sample], folder: Path) -> CachedFeatures:
    """A cache of features, at random, as large as those of CLIP-L/14-336."""
    refs = {image_key(ref): ref for sample in samples for ref in sample.images}
    keys = {name: hashlib.sha256(image_bytes(ref)).digest() for name, ref in refs.items()}
    distinct = sorted(set(keys.values()))
    features = [torch.randn(1, PATCHES, CHANNELS).bfloat16() for _ in distinct]
    cache = FeatureCache(folder)
    cache.add(distinct, features, [(480, 480)] * len(distinct))
    cache.refresh()
    return CachedFeatures(cache, keys)


class LazySupervisedDataset(Dataset[dict[str, Tensor]]):
    """Records prepared when they are asked for."""

    def __init__(self, samples: Sequence[Sample], tokenizer: Any) -> None:
        self._samples = samples
        self._tokenizer = tokenizer
        self._processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self._samples[index]
        path = sample.images[0].path
        assert path is not None, "this loop reads image files"
        image = self._to_square(Image.open(path).convert("RGB"))
        pixels = self._processor.preprocess(image, return_tensors="pt")["pixel_values"][0]
        return {**self._tokenize(sample), "image": pixels}

    def _to_square(self, image: Image.Image) -> Image.Image:
        if image.width == image.height:
            return image
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in OPENAI_CLIP_MEAN))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    def _tokenize(self, sample: Sample) -> dict[str, Tensor]:
        texts = ["".join(IMAGE_TOKEN if isinstance(p, ImagePart) else p.text for p in m.parts) for m in sample.messages]
        begin, end = TEMPLATE.answer_start, TEMPLATE.answer_end
        turns = [
            f"{TEMPLATE.user[0]}{question}{TEMPLATE.user[1]}{begin}{answer}{end}"
            for question, answer in zip(texts[::2], texts[1::2], strict=True)
        ]
        ids = torch.tensor(self._ids("".join(turns)))
        labels = ids.clone()
        place = 0
        for turn in turns:
            instruction, _, _ = turn.partition(begin)
            labels[place : place + len(self._ids(instruction + begin))] = IGNORE_INDEX
            place += len(self._ids(turn))
        assert place == len(ids), "tokens of the turns are those of the conversation"
        return {"input_ids": ids, "labels": labels}

    def _ids(self, text: str) -> list[int]:
        """The text's tokens with one placeholder for an image, which LLaVA's model replaces."""
        chunks = [self._tokenizer(chunk, add_special_tokens=False).input_ids for chunk in text.split(IMAGE_TOKEN)]
        ids: list[int] = chunks[0]
        for chunk in chunks[1:]:
            ids = [*ids, -200, *chunk]
        return ids


class LazyCollator:
    """Pads and stacks."""

    def __init__(self, pad_token_id: int) -> None:
        self._pad = pad_token_id

    def __call__(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids = pad_sequence([item["input_ids"] for item in items], batch_first=True, padding_value=self._pad)
        labels = pad_sequence([item["labels"] for item in items], batch_first=True, padding_value=IGNORE_INDEX)
        images = torch.stack([item["image"] for item in items])
        return {"input_ids": ids, "labels": labels, "attention_mask": ids.ne(self._pad), "images": images}
