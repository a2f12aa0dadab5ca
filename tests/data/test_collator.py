"""From samples to padded batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from symphony_vlm.data.collator import ConversationCollator, ConversationDataset, EncodedSample
from symphony_vlm.data.conversation import IGNORE_INDEX, EncodedConversation
from symphony_vlm.data.sample import ImageRef, Message, Sample, TextPart

PAD = 9


def _normalize(squares: list[np.ndarray]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(square).permute(2, 0, 1).float() for square in squares])


def _encoded(ids: list[int], labels: list[int], *images: int) -> EncodedSample:
    return {
        "input_ids": np.asarray(ids, dtype=np.int32),
        "labels": np.asarray(labels, dtype=np.int32),
        "images": [np.full((2, 2, 3), value, dtype=np.uint8) for value in images],
        "image_sizes": [(2, 2) for _ in images],
    }


def test_rows_are_padded_on_the_right_and_padding_is_neither_attended_nor_supervised() -> None:
    collate = ConversationCollator(PAD, _normalize)
    batch = collate([_encoded([1, 2, 3], [-100, 2, 3]), _encoded([4], [4])])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, PAD, PAD]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, IGNORE_INDEX, IGNORE_INDEX]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert all(value.dtype == torch.long for value in batch.values())


def test_a_pad_token_inside_a_text_stays_attended_and_supervised() -> None:
    """Many language models have no pad token of their own and use the end token."""
    batch = ConversationCollator(PAD, _normalize)([_encoded([1, PAD], [-100, PAD])])
    assert batch["attention_mask"].tolist() == [[1, 1]]
    assert batch["labels"].tolist() == [[-100, PAD]]


def test_images_of_all_rows_are_stacked_in_reading_order() -> None:
    collate = ConversationCollator(PAD, _normalize)
    batch = collate([_encoded([1], [1], 5, 3), _encoded([1], [1]), _encoded([1], [1], 7)])
    assert batch["pixel_values"].shape == (3, 3, 2, 2)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [5, 3, 7]


def test_a_batch_without_images_has_no_pixels() -> None:
    assert "pixel_values" not in ConversationCollator(PAD, _normalize)([_encoded([1], [1])])


def test_tiles_of_all_rows_are_stacked_with_the_sizes_of_their_images() -> None:
    def tiles(*values: int) -> np.ndarray:
        return np.stack([np.full((2, 2, 3), value, dtype=np.uint8) for value in values])

    samples = [_encoded([1], [1]), _encoded([1], [1]), _encoded([1], [1])]
    samples[0] |= {"images": [tiles(1, 2), tiles(3)], "image_sizes": [(5, 9), (2, 3)]}
    samples[2] |= {"images": [tiles(4, 5, 6)], "image_sizes": [(7, 1)]}
    collate = ConversationCollator(PAD, lambda images: _normalize([tile for image in images for tile in image]))
    batch = collate(samples)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert batch["image_sizes"].tolist() == [[5, 9], [2, 3], [7, 1]]
    assert "image_sizes" not in collate([_encoded([1], [1])])


class Source:
    """Samples about one red and one blue picture, and the counts of what was read."""

    def __init__(self, folder: Path) -> None:
        self.encoded = self.opened = 0
        self.refs = []
        for colour in ("red", "blue"):
            Image.new("RGB", (4, 4), colour).save(folder / f"{colour}.png")
            self.refs.append(ImageRef(path=folder / f"{colour}.png", name=colour))
        message = Message(role="user", parts=(TextPart(text="a"),))
        self.samples = [
            Sample(id=str(i), origin=str(i), messages=(message,), images=tuple(self.refs[j] for j in images))
            for i, images in enumerate([(0,), (0, 1), (1, 0)])
        ]

    def dataset(self, **settings: Any) -> ConversationDataset:
        def encode(sample: Sample) -> EncodedConversation:
            self.encoded += 1
            order = tuple(range(len(sample.images)))
            # The last sample has its images in the text in the other order.
            return EncodedConversation(
                input_ids=[1, 2], labels=[-100, 2], image_order=order[:: -1 if sample.id == "2" else 1]
            )

        def to_square(image: Image.Image) -> np.ndarray:
            self.opened += 1
            return np.asarray(image)

        return ConversationDataset(self.samples, encode=encode, to_square=to_square, **settings)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


def _colours(sample: EncodedSample) -> list[str]:
    return ["red" if image[0, 0, 0] else "blue" for image in sample["images"]]


def test_images_come_in_the_order_of_their_places_in_the_text(source: Source) -> None:
    dataset = source.dataset()
    assert [_colours(dataset[i]) for i in range(len(dataset))] == [["red"], ["red", "blue"], ["red", "blue"]]


def test_sizes_are_those_of_the_images_before_preparation(source: Source, tmp_path: Path) -> None:
    Image.new("RGB", (4, 7), "red").save(tmp_path / "red.png")
    for budget in (0, 2**20):
        dataset = source.dataset(cache_bytes=budget)
        for _ in range(2):
            assert dataset[1]["image_sizes"] == [(7, 4), (4, 4)]


def test_a_second_epoch_reads_everything_from_memory(source: Source) -> None:
    dataset = source.dataset()
    for _ in range(2):
        for i in range(len(dataset)):
            assert dataset[i]["input_ids"].tolist() == [1, 2]
    assert (source.encoded, source.opened) == (3, 2)


@pytest.mark.parametrize("budget", [0, 20, 60])
def test_a_small_cache_changes_nothing_but_the_work(source: Source, budget: int) -> None:
    unlimited = source.dataset()
    dataset = source.dataset(cache_bytes=budget)
    for _ in range(2):
        for i in range(len(dataset)):
            assert _colours(dataset[i]) == _colours(unlimited[i])
            np.testing.assert_array_equal(dataset[i]["labels"], unlimited[i]["labels"])
    held = sum(image.nbytes for image in dataset._images.values())
    held += sum(ids.nbytes + labels.nbytes for ids, labels, _ in dataset._tokens.values())
    assert held <= budget


def test_a_batch_of_real_samples_trains_a_real_model(tiny_moe_model: Any, tmp_path: Path) -> None:
    """The pieces fit: processor, data set, collator, model; only answers and their ends are supervised."""
    from symphony_vlm.data.datasets import open_samples
    from symphony_vlm.data.scenes import generate_scenes

    processor = tiny_moe_model.processor
    samples = open_samples(generate_scenes(tmp_path / "scenes", train=3, test=1).train_json)
    dataset = ConversationDataset(
        samples,
        encode=lambda sample: processor.encode(sample.messages, max_length=2048, origin=sample.origin),
        to_square=lambda image: np.asarray(processor.image_processor.to_square(image)),
    )
    collate = ConversationCollator(
        processor.tokenizer.pad_token_id, lambda squares: processor.image_processor(squares)["pixel_values"]
    )
    batch = collate([dataset[i] for i in range(len(dataset))])
    for row, sample in enumerate(samples):
        kept = batch["labels"][row][batch["labels"][row] != IGNORE_INDEX]
        answers = [message.text for message in sample.messages if message.role == "assistant"]
        end = processor.tokenizer.eos_token
        assert processor.tokenizer.decode(kept) == "".join(f"{answer}{end}" for answer in answers)
    assert torch.isfinite(tiny_moe_model(**batch).loss)
