"""Turns that do not see each other: each gets what it would get alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from symphony_vlm.data.collator import turn_ids
from symphony_vlm.errors import InputError
from symphony_vlm.model.turns import separate_turns

IMAGE = 9
IGNORED = -100


def test_turns_are_counted_by_answers_and_the_image_is_shared() -> None:
    ids = torch.tensor([[5, 9, 9, 1, 2, 3, 1, 4, 0, 0], [1, 2, 1, 3, 3, 9, 9, 1, 2, 0]])
    labels = torch.full_like(ids, IGNORED)
    labels[0, [4, 5, 7]] = ids[0, [4, 5, 7]]
    labels[1, [1, 3, 8]] = ids[1, [1, 3, 8]]
    assert turn_ids(ids, labels, IMAGE).tolist() == [
        [-1, -1, -1, 0, 0, 0, 1, 1, 2, 2],
        # An image of a later turn is that turn's own.
        [0, 0, 1, 1, 2, 2, 2, 2, 2, 3],
    ]


def test_mask_and_positions_by_hand() -> None:
    turns = torch.tensor([[-1, -1, 0, 0, 1, 2]])
    mask, positions = separate_turns(
        turns, torch.tensor([[1, 1, 1, 1, 1, 0]]), implementation="sdpa", dtype=torch.float32
    )
    assert positions.tolist() == [[0, 1, 2, 3, 2, 2]]
    assert mask[0, 0].long().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 1, 1, 1, 0],
    ]


def test_other_attention_is_refused() -> None:
    turns = torch.tensor([[0, 1]])
    with pytest.raises(InputError, match="flash_attention_2"):
        separate_turns(turns, torch.ones_like(turns), implementation="flash_attention_2", dtype=torch.float32)


def _conversation(model: Any, questions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and image of one record: the image, then that many questions of three and answers of two tokens."""
    image = model.config.image_token_id
    generator = torch.Generator().manual_seed(0)
    shared = torch.full((1, model.processor.num_image_tokens), image)
    words = torch.randint(10, 60, (1, 5 * questions), generator=generator)
    ids = torch.cat([shared, words], dim=1)
    labels = torch.full_like(ids, IGNORED)
    for turn in range(questions):
        end = shared.shape[1] + 5 * turn + 5
        labels[:, end - 2 : end] = ids[:, end - 2 : end]
    size = model.vision_tower.config.image_size
    return ids, labels, torch.rand(1, 3, size, size, generator=generator)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_each_turn_gets_the_logits_it_gets_alone(tiny_moe_model: Any, implementation: str) -> None:
    model = tiny_moe_model.eval()
    model.language_model.set_attn_implementation(implementation)
    ids, labels, pixels = _conversation(model, 3)
    prefix = model.processor.num_image_tokens
    # Padding behind, as in a batch with a longer record.
    padded = torch.nn.functional.pad(ids, (0, 4))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 4))
    turns = turn_ids(padded, torch.nn.functional.pad(labels, (0, 4), value=IGNORED), model.config.image_token_id)
    with torch.no_grad():
        together = model(input_ids=padded, attention_mask=mask, pixel_values=pixels, turn_ids=turns).logits
        for turn in range(3):
            own = slice(prefix + 5 * turn, prefix + 5 * turn + 5)
            alone_ids = torch.cat([ids[:, :prefix], ids[:, own]], dim=1)
            alone = model(input_ids=alone_ids, pixel_values=pixels).logits
            # The same sums in another order: about 1e-7 of logits near 1, over two layers.
            torch.testing.assert_close(together[:, own], alone[:, prefix:], rtol=1e-5, atol=1e-5)
        plain = model(input_ids=padded, attention_mask=mask, pixel_values=pixels).logits
    later = slice(prefix + 5, prefix + 10)
    assert not torch.allclose(together[:, later], plain[:, later], atol=1e-4), "the turns would see each other"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_routers_count_the_real_tokens(tiny_moe_model: Any, implementation: str) -> None:
    model = tiny_moe_model.train()
    model.language_model.set_attn_implementation(implementation)
    ids, labels, pixels = _conversation(model, 2)
    ids, labels = torch.nn.functional.pad(ids, (0, 3)), torch.nn.functional.pad(labels, (0, 3), value=IGNORED)
    mask = (torch.arange(ids.shape[1]) < ids.shape[1] - 3).long()[None]
    turns = turn_ids(ids, labels, model.config.image_token_id)
    model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels, turn_ids=turns).loss.backward()
    assert model.routing.token_mask_T is not None
    assert torch.equal(model.routing.token_mask_T, mask[0].bool())


def test_turns_without_a_mask_are_refused_and_not_ignored(tiny_moe_model: Any) -> None:
    ids, labels, pixels = _conversation(tiny_moe_model, 2)
    turns = turn_ids(ids, labels, tiny_moe_model.config.image_token_id)
    with pytest.raises(ValueError, match="turn_ids needs attention_mask"):
        tiny_moe_model(input_ids=ids, pixel_values=pixels, turn_ids=turns)
