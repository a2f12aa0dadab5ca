"""Attention by document: what it computes, where it is used, and that it leaves no trace."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import symphony_vlm.model.attention as attention
from symphony_vlm.model.attention import BY_DOCUMENT, attention_by_document, document_arguments
from symphony_vlm.moe.documents import Documents

IDS = torch.tensor([[0] * 5 + [1] * 9 + [2] * 1 + [3] * 6 + [-1] * 3, [0] * 12 + [1] * 12])
# fp32 sums in another order over two layers, on logits near 1; measured worst case 6e-7.
TOLERANCE = 5e-6
FAMILIES = [
    ("llama", "sdpa", {}),
    ("llama", "eager", {}),
    ("qwen3", "sdpa", {}),
    ("mistral", "sdpa", {"sliding_window": 4}),
    ("mistral", "eager", {"sliding_window": 4}),
    ("mistral", "sdpa", {"sliding_window": None}),
    ("gemma2", "eager", {"sliding_window": 4}),
    ("gemma3_text", "sdpa", {"sliding_window": 4}),
    ("phi3", "sdpa", {"sliding_window": 4}),
    ("olmoe", "sdpa", {}),
]


def make(family: str, implementation: str, **settings: Any) -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(family, **(sizes | settings))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.normal_(0.0, 0.3)
    return model.eval()


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(3, 40, IDS.shape, generator=torch.Generator().manual_seed(seed))


def spans() -> list[tuple[int, slice]]:
    """Rows and places of all documents."""
    found = []
    for row, ids in enumerate(IDS.tolist()):
        for number in range(max(ids) + 1):
            start = ids.index(number)
            found.append((row, slice(start, start + ids.count(number))))
    return found


@torch.no_grad()
def packed(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with attention_by_document(model):
        logits: Tensor = model(input_ids=ids, **document_arguments(Documents.from_ids(IDS), model)).logits
    return logits


@pytest.mark.parametrize(("family", "implementation", "settings"), FAMILIES)
def test_every_document_gets_the_logits_it_gets_alone(
    family: str, implementation: str, settings: dict[str, Any]
) -> None:
    model, ids = make(family, implementation, **settings), tokens()
    logits = packed(model, ids)
    with torch.no_grad():
        for row, span in spans():
            alone = model(input_ids=ids[row : row + 1, span]).logits
            torch.testing.assert_close(logits[row : row + 1, span], alone, rtol=TOLERANCE, atol=TOLERANCE)
    if settings.get("sliding_window"):
        row, span = spans()[1]
        wide = packed(make(family, implementation, sliding_window=64), ids)
        assert not torch.allclose(logits[row, span], wide[row, span], atol=1e-3), "the window is seen"


@pytest.mark.parametrize(("family", "implementation", "settings"), FAMILIES)
def test_another_document_changes_no_bit(family: str, implementation: str, settings: dict[str, Any]) -> None:
    model, ids = make(family, implementation, **settings), tokens()
    # Rows of a product do not depend on the other rows, but for how OLMoE's library experts gather them.
    if family == "olmoe":
        model.set_experts_implementation("batched_mm")
    before = packed(model, ids)
    row, changed = spans()[1]
    other = ids.clone()
    other[row, changed] = tokens(seed=1)[row, changed]
    other[IDS < 0] = 7
    after = packed(model, other)
    for r, span in spans():
        assert torch.equal(before[r, span], after[r, span]) == ((r, span) != (row, changed))


def test_sdpa_attends_document_by_document_and_no_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, Any]] = []

    def spy(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        seen.append((query.shape[2], mask))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
    packed(make("llama", "sdpa"), tokens())
    assert seen == [(length, None) for length in (5, 9, 1, 6, 3, 12, 12)] * 2


def test_without_documents_it_is_sdpa_bit_for_bit() -> None:
    model, ids = make("llama", "sdpa"), tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # left padding, as in generation
    arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask).logits
        answers = model.generate(**arguments)
        with attention_by_document(model):
            assert model.config._attn_implementation == BY_DOCUMENT
            assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, plain)
            assert torch.equal(model.generate(**arguments), answers)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_usual_attention_is_back_after_an_error_and_never_in_a_saved_model(
    implementation: str, tmp_path: Path
) -> None:
    model = make("llama", implementation)
    with pytest.raises(KeyError), attention_by_document(model):
        model.save_pretrained(tmp_path)
        raise KeyError
    assert model.config._attn_implementation == implementation
    assert all(layer.self_attn.config._attn_implementation == implementation for layer in model.model.layers)
    assert BY_DOCUMENT not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_flash_attention_hears_where_documents_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel needs a GPU; here a loop over what the library's function is given stands in for it."""
    model, ids = make("llama", "sdpa"), tokens()
    expected = packed(model, ids)

    def varlen(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        assert attention_mask is None
        rows = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]
        ends = kwargs["cu_seq_lens_q"].tolist()
        assert max(b - a for a, b in itertools.pairwise(ends)) == kwargs["max_length_k"]
        outputs = []
        for a, b in itertools.pairwise(ends):
            q, k, v = (states[a:b].transpose(0, 1)[None] for states in rows)
            outputs.append(sdpa_attention_forward(module, q, k, v, None, scaling=kwargs["scaling"])[0])
        return torch.cat(outputs, dim=1).view(*query.shape[:1], query.shape[2], -1, query.shape[3]), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", varlen)
    model.config._attn_implementation = "flash_attention_2"
    assert torch.equal(packed(model, ids), expected)
