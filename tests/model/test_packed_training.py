"""Training on packed rows is training on the conversations themselves: same losses, same gradients, no leak."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from symphony_vlm.data.collator import ConversationCollator, EncodedSample
from symphony_vlm.data.packing import PackedCollator
from symphony_vlm.model.attention import attention_by_document
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import update_expert_graphs

ROUTERS = [None, "smoe", "symphony_smoe", "similarity_smoe", "attention_smoe"]
# By sample: images and tokens of text; the fourth is text alone, the last has its picture behind the text.
SAMPLES = [(1, 9), (2, 5), (1, 20), (0, 12), (1, 7)]
PACKS = [[2, 3, 0], [4, 1]]


def _model(factory: Any, router: str | None, **settings: Any) -> Any:
    moe = None if router is None else MoEConfig(num_experts=4, router=router, **settings)
    model = factory(moe=moe)
    if moe is not None:
        # Clear preferences, so that routing shows.
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in (m for m in model.modules() if type(m).__name__ == "SparseMoE"):
                layer.router.gate.weight.copy_(torch.randn(layer.router.gate.weight.shape, generator=generator))
                for weight in layer.experts.parameters():
                    weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return model


def _samples(model: Any, seed: int = 0) -> list[EncodedSample]:
    generator = np.random.default_rng(seed)
    size = model.vision_tower.config.image_size
    encoded: list[EncodedSample] = []
    for number, (num_images, num_words) in enumerate(SAMPLES):
        words = generator.integers(10, 60, num_words)
        pictures = np.full(num_images * model.processor.num_image_tokens, model.config.image_token_id)
        ids = np.concatenate([words, pictures] if number == 4 else [pictures, words]).astype(np.int32)
        labels = np.where(ids == model.config.image_token_id, -100, ids).astype(np.int32)
        # The sample of text alone is supervised from its first token, which nothing precedes and nothing may predict.
        labels[: len(ids) - 4 if number != 3 else 0] = -100
        if number == 4:
            labels[:num_words] = ids[:num_words]
        images = [generator.integers(0, 255, (size, size, 3)).astype(np.uint8) for _ in range(num_images)]
        encoded.append({"input_ids": ids, "labels": labels, "images": images})
    return encoded


def _collators(model: Any) -> tuple[ConversationCollator, PackedCollator]:
    def normalize(squares: list[np.ndarray]) -> Tensor:
        pixels: Tensor = model.processor.image_processor(squares)["pixel_values"]
        return pixels

    rows = ConversationCollator(model.processor.tokenizer.pad_token_id, normalize)
    return rows, PackedCollator(rows)


def _attention(model: Any, by_document: bool) -> Any:
    return attention_by_document(model.language_model) if by_document else nullcontext()


@pytest.mark.parametrize("by_document", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
def test_another_document_changes_no_bit(tiny_model_factory: Any, router: str | None, by_document: bool) -> None:
    """Also where the other document has other pictures, in fp32."""
    # One product for each token: in the others the kernels see other shapes when other tokens choose other experts,
    # and may round differently.
    model = _model(tiny_model_factory, router, **({"experts_implementation": "batched_mm"} if router else {}))
    _, collate = _collators(model)
    samples, others = _samples(model), _samples(model, seed=1)
    with torch.no_grad(), _attention(model, by_document):
        before = model(**collate([[samples[i] for i in pack] for pack in PACKS]))
        after = model(**collate([[others[i] if i == 2 else samples[i] for i in pack] for pack in PACKS]))
    length = len(samples[2]["input_ids"])
    assert not torch.allclose(before.logits[0, :length], after.logits[0, :length], atol=1e-3)
    rest = length + len(samples[3]["input_ids"]) + len(samples[0]["input_ids"])
    assert torch.equal(before.logits[0, length:rest], after.logits[0, length:rest])
    assert torch.equal(before.logits[1], after.logits[1])


@pytest.mark.parametrize("by_document", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
def test_losses_and_gradients_are_those_of_the_conversations_in_rows_of_their_own(
    tiny_model_factory: Any, router: str | None, by_document: bool
) -> None:
    """The same tokens are in the micro-batch, so the router losses, means over them, are the same too.

    The vision tower is frozen here (and in evaluation mode): it gets the same pictures in another order.
    """
    model = _model(tiny_model_factory, router)
    model.vision_tower.requires_grad_(False)
    model.train()
    rows, collate = _collators(model)
    samples = _samples(model)
    twin = copy.deepcopy(model)
    order = [i for pack in PACKS for i in pack]
    loose = model(**rows([samples[i] for i in order]))
    loose.loss.backward()
    with _attention(twin, by_document):
        packed = twin(**collate([[samples[i] for i in pack] for pack in PACKS]))
        packed.loss.backward()
    assert packed.loss_parts is not None and packed.loss_parts.keys() == loose.loss_parts.keys()
    for name, value in loose.loss_parts.items():
        torch.testing.assert_close(packed.loss_parts[name], value, rtol=1e-5, atol=1e-6)
    _assert_equal_gradients(model, twin)
    if router == "symphony_smoe":
        # Hard counts are whole numbers: padding counts in neither.
        for model_ in (model, twin):
            update_expert_graphs(model_)
        for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
            assert torch.equal(ours, theirs)


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_step(tiny_model_factory: Any) -> None:
    """Cross entropy alone: a router loss is a mean over its micro-batch, and these hold other tokens."""
    model = _model(tiny_model_factory, "smoe", balance_loss_weight=0.0, z_loss_weight=0.0).train()
    model.vision_tower.requires_grad_(False)
    rows, collate = _collators(model)
    samples = _samples(model)
    twin = copy.deepcopy(model)
    supervised = sum(int((sample["labels"][1:] != -100).sum()) for sample in samples)
    total = 0.0
    for micro_batch in ([0, 1], [2, 3], [4]):
        batch = rows([samples[i] for i in micro_batch])
        loss = model(**batch, num_items_in_batch=supervised).loss
        loss.backward()
        total += float(loss.detach())
    packed_total = 0.0
    with attention_by_document(twin.language_model):
        for pack in PACKS:
            loss = twin(**collate([[samples[i] for i in pack]]), num_items_in_batch=supervised).loss
            loss.backward()
            packed_total += float(loss.detach())
    assert packed_total == pytest.approx(total, abs=1e-5)
    _assert_equal_gradients(model, twin)


def test_checkpointed_activations_stay_within_documents_too(tiny_model_factory: Any) -> None:
    """Attention runs a second time in the backward pass."""
    model = _model(tiny_model_factory, "similarity_smoe").train()
    twin = copy.deepcopy(model)
    twin.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, collate = _collators(model)
    batch = collate([[_samples(model)[i] for i in pack] for pack in PACKS])
    for one in (model, twin):
        with attention_by_document(one.language_model):
            one(**batch).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name


def _assert_equal_gradients(model: Any, twin: Any) -> None:
    """To fp32 rounding: the sums over tokens are the same but for their order, over about 150 tokens.

    Relative to the largest entry of each tensor; measured worst case 2e-6.
    """
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if ours.grad is None:
            assert theirs.grad is None, name
            continue
        assert theirs.grad is not None, name
        difference = (ours.grad - theirs.grad).abs().max()
        assert difference <= 2e-5 * ours.grad.abs().max() + 1e-8, (name, float(difference))


@pytest.mark.parametrize("other", ["attention_mask", "position_ids", "turn_ids"])
def test_what_contradicts_documents_is_refused(tiny_model_factory: Any, other: str) -> None:
    model = tiny_model_factory()
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="document_ids excludes"):
        model(input_ids=ids + 10, document_ids=ids, **{other: ids})
