"""Cross entropy in chunks is that of all logits: loss, gradients, whatever a family does after its head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from symphony_vlm.model import chunked_loss
from symphony_vlm.model.configuration import SymphonyLMConfig
from symphony_vlm.model.language_model import SymphonyForCausalLM
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import expert_graphs, update_expert_graphs

VOCAB_SIZE = 64
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt_bigcode": {"n_inner": 24, "multi_query": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    # Tied, scaled embeddings; logits capped, so near the cap that leaving it out would show.
    "gemma2": {"head_dim": 8, "num_key_value_heads": 1, "final_logit_softcapping": 0.05},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0},
}


def build(family: str) -> SymphonyForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, vocab_size=VOCAB_SIZE, **sizes, **tokens, **FAMILIES[family])
    moe = MoEConfig(router="symphony_smoe", num_experts=4, z_loss_weight=0.001)
    torch.manual_seed(0)
    return SymphonyForCausalLM(SymphonyLMConfig(text_config=config, moe=moe)).train()


def batch_of() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB_SIZE, (3, 20), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :9] = labels[2, 12:] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.fixture
def few_logits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Chunks of seven tokens; the list gets the size of each one that is made."""
    made: list[int] = []
    original = chunked_loss.DeferredHead.logits

    def logits(self: chunked_loss.DeferredHead, hidden_nD: Tensor) -> Tensor:
        made.append(len(hidden_nD))
        return original(self, hidden_nD)

    monkeypatch.setattr(chunked_loss.DeferredHead, "logits", logits)
    monkeypatch.setattr(chunked_loss, "MAX_LOGITS", 7 * VOCAB_SIZE + 1)
    yield made


def run(model: SymphonyForCausalLM, **extra: Any) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    out = model(**batch_of(), **extra)
    (3 * out.loss).backward()  # as by accumulation or a scaler
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_all_logits(
    family: str, few_logits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over the same terms in another order, in fp32: some units of the last place of numbers around 1."""
    model = build(family)
    chunked, found = run(model, num_items_in_batch=100)
    assert few_logits == [7] * 5 + [6], "19 + 19 + 19 targets less 8 and 8 that are left out"
    assert chunked.logits is None
    monkeypatch.setattr(chunked_loss, "MAX_LOGITS", 2**29)
    whole, wanted = run(model, num_items_in_batch=100)
    assert len(few_logits) == 6
    torch.testing.assert_close(chunked.loss, whole.loss, atol=1e-6, rtol=1e-6)
    assert found.keys() == wanted.keys() and chunked.loss_parts.keys() == whole.loss_parts.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-7, rtol=1e-4, msg=lambda text, name=name: name + text)
    for name, value in whole.loss_parts.items():
        torch.testing.assert_close(chunked.loss_parts[name], value, atol=1e-6, rtol=1e-6)


def test_what_trains_alone_gets_gradients(few_logits: list[int]) -> None:
    """With a frozen head gradients go through it; with everything else frozen they stop at it."""
    model = build("llama")
    head = model.get_output_embeddings().weight
    head.requires_grad_(False)
    _, through = run(model)
    assert "language_model.lm_head.weight" not in through
    assert through["language_model.model.embed_tokens.weight"].any()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is head)
    for layer in model.routing._layers:
        layer.router.requires_grad_(False)
    _, alone = run(model)
    assert list(alone) == ["language_model.lm_head.weight"] and alone["language_model.lm_head.weight"].any()


def test_under_autocast_weights_are_summed_in_fp32(few_logits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 has 8 bits. Both round each logit and gradient alike; the sums over chunks are in fp32 instead."""
    model = build("llama")
    with torch.autocast("cpu", torch.bfloat16):
        chunked, found = run(model)
        monkeypatch.setattr(chunked_loss, "MAX_LOGITS", 2**29)
        whole, wanted = run(model)
    torch.testing.assert_close(chunked.loss, whole.loss, atol=1e-5, rtol=0)
    for name, gradient in wanted.items():
        assert found[name].dtype == torch.float32
        difference = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert difference < 2**-6, name


def test_a_pass_in_chunks_is_one_pass_for_routers_and_counts(few_logits: list[int]) -> None:
    model, twin = build("llama"), build("llama")
    run(model)
    update_expert_graphs(model)
    twin(**{k: v for k, v in batch_of().items() if k != "labels"})
    update_expert_graphs(twin)
    graphs, expected = ([g for _, g in expert_graphs(m)] for m in (model, twin))
    assert few_logits
    for graph, other in zip(graphs, expected, strict=True):
        assert torch.equal(graph.adjacency_EE, other.adjacency_EE) and graph.num_updates == 1


def test_hooks_and_methods_are_left_as_they_were(few_logits: list[int]) -> None:
    model = build("llama")
    decoder, head = model.language_model.base_model, model.get_output_embeddings()
    run(model)
    assert few_logits
    assert "forward" not in vars(decoder)
    assert not head._forward_pre_hooks and not decoder._forward_hooks
    ids = batch_of()["input_ids"]
    with torch.no_grad():
        assert model.eval()(ids).logits.shape == (3, 20, VOCAB_SIZE)


def test_without_gradients_there_is_a_loss(few_logits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    model.routing.config = MoEConfig(num_experts=4, balance_loss_weight=0.0, z_loss_weight=0.0)
    with torch.no_grad():
        chunked = model(**batch_of()).loss
        assert few_logits
        monkeypatch.setattr(chunked_loss, "MAX_LOGITS", 2**29)
        torch.testing.assert_close(chunked, model(**batch_of()).loss, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("supervised", "chunks"), [(5, [5]), (0, [0])])
def test_few_targets_among_many_positions_are_one_chunk(
    supervised: int, chunks: list[int], few_logits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many there are only the device knows; a batch without any must train as its neighbours on other ranks do."""
    model = build("llama")
    batch = batch_of()
    batch["labels"][:] = -100
    batch["labels"][1, 4 : 4 + supervised] = batch["input_ids"][1, 4 : 4 + supervised]
    results = []
    for limit in (chunked_loss.MAX_LOGITS, 2**29):
        monkeypatch.setattr(chunked_loss, "MAX_LOGITS", limit)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    assert few_logits == chunks
    (loss, found), (expected, wanted) = results
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    for name, gradient in wanted.items():
        assert gradient is not None and found[name] is not None
        torch.testing.assert_close(found[name], gradient, atol=2e-7, rtol=1e-4)
    assert bool(wanted["language_model.lm_head.weight"].any()) == bool(supervised)
