"""Image features in the places of their placeholders, in reading order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from symphony_vlm.model.merge import images_of_rows, merge_image_features, position_ids_from_mask

IMAGE, HIDDEN, PER_IMAGE = 9, 4, 2
IDS_BS = torch.tensor([[1, 9, 9, 2, 9, 9], [9, 9, 3, 4, 0, 0]])


def features(number: int) -> Tensor:
    """Image n consists of the constant 10 n, its features of 10 n + p."""
    base = torch.arange(number)[:, None] * 10 + torch.arange(PER_IMAGE) + 100
    return base[..., None].expand(-1, -1, HIDDEN).float()


def embeds(ids: Tensor) -> Tensor:
    return -ids[..., None].expand(*ids.shape, HIDDEN).float()


def test_features_stand_in_reading_order_and_words_stay() -> None:
    before = embeds(IDS_BS)
    merged = merge_image_features(before, features(3), IDS_BS, IMAGE)
    assert merged[..., 0].tolist() == [[-1, 100, 101, -2, 110, 111], [120, 121, -3, -4, 0, 0]]
    assert torch.equal(before, embeds(IDS_BS))


def test_swapping_two_images_changes_their_places_only() -> None:
    merged = merge_image_features(embeds(IDS_BS), features(3), IDS_BS, IMAGE)
    swapped = merge_image_features(embeds(IDS_BS), features(3)[[1, 0, 2]], IDS_BS, IMAGE)
    changed = (merged != swapped).any(-1)
    assert changed.tolist() == [[False, True, True, False, True, True], [False] * 6]


def test_images_may_have_different_numbers_of_features() -> None:
    ids = torch.tensor([[9, 1, 9, 9, 9], [2, 3, 9, 9, 0]])
    parts = [torch.full((1, HIDDEN), 100.0), torch.full((3, HIDDEN), 200.0), torch.full((2, HIDDEN), 300.0)]
    merged = merge_image_features(embeds(ids), parts, ids, IMAGE)
    assert merged[..., 0].tolist() == [[100, -1, 200, 200, 200], [-2, -3, 300, 300, 0]]
    with pytest.raises(ValueError, match=r"6 image placeholder tokens but 4 image features \(images of 1, 3\)"):
        merge_image_features(embeds(ids), parts[:2], ids, IMAGE)


@pytest.mark.parametrize(
    ("placeholders", "tokens", "rows"),
    [
        ([4, 0, 2], [2, 2, 2], [[0, 1], [], [2]]),
        ([5, 3], [1, 4, 3], [[0, 1], [2]]),
        ([0, 0], [], [[], []]),
    ],
)
def test_rows_have_their_images_in_order(placeholders: list[int], tokens: list[int], rows: list[list[int]]) -> None:
    assert [list(row) for row in images_of_rows(placeholders, tokens)] == rows


@pytest.mark.parametrize(("placeholders", "tokens"), [([3], [2, 2]), ([2, 2], [2]), ([1], [])])
def test_rows_that_no_whole_images_fill_are_refused(placeholders: list[int], tokens: list[int]) -> None:
    with pytest.raises(ValueError, match=f"{placeholders[-1]} image placeholder tokens in row"):
        images_of_rows(placeholders, tokens)


def test_without_images_the_embeddings_pass() -> None:
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(merge_image_features(embeds(ids), None, ids, IMAGE), embeds(ids))


@pytest.mark.parametrize(("number", "shape"), [(2, "2 images x 2"), (4, "4 images x 2"), (0, "no images")])
def test_a_mismatch_names_both_counts_and_each_row(number: int, shape: str) -> None:
    given = features(number) if number else None
    with pytest.raises(ValueError, match=rf"6 image placeholder tokens but {number * 2} image features") as error:
        merge_image_features(embeds(IDS_BS), given, IDS_BS, IMAGE)
    assert shape in str(error.value) and "[4, 2]" in str(error.value)


def test_gradients_reach_features_and_words_but_not_placeholders() -> None:
    before, images = embeds(IDS_BS).requires_grad_(), features(3).requires_grad_()
    merge_image_features(before, images, IDS_BS, IMAGE).sum().backward()
    assert before.grad is not None and images.grad is not None
    assert torch.equal(images.grad, torch.ones_like(images))
    assert torch.equal(before.grad[..., 0], (IDS_BS != IMAGE).float())


def test_features_take_the_precision_of_the_words() -> None:
    merged = merge_image_features(embeds(IDS_BS).bfloat16(), features(3), IDS_BS, IMAGE)
    assert merged.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("mask", "positions"),
    [
        ([1, 1, 1, 1], [0, 1, 2, 3]),
        ([0, 0, 1, 1], [0, 0, 0, 1]),
        ([1, 1, 0, 0], [0, 1, 1, 1]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_positions_count_real_tokens(mask: list[int], positions: list[int]) -> None:
    assert position_ids_from_mask(torch.tensor([mask])).tolist() == [positions]
