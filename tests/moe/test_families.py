"""Every family of dense language models with every preset and option: upcycling leaves the logits as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from symphony_vlm.errors import InputError
from symphony_vlm.moe.configuration import PRESETS, MoEConfig
from symphony_vlm.moe.feed_forward import recognise
from symphony_vlm.moe.proof import MAX_LOGIT_DIFFERENCE
from symphony_vlm.moe.recording import sparse_layers
from symphony_vlm.moe.upcycle import upcycle_

MakeModel = Callable[..., PreTrainedModel]
MakeIds = Callable[..., Tensor]

GATED = {
    "llama": {},
    "llama with biases": {"mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "gemma2": {},
    "gemma3_text": {},
    "smollm3": {},
}
PLAIN = {"phi": {"hidden_act": "gelu_new"}, "starcoder2": {}}
"""Two linear layers with biases."""
FAMILIES: dict[str, dict[str, Any]] = GATED | PLAIN


def build(language_model: MakeModel, family: str, **settings: Any) -> PreTrainedModel:
    model = language_model(family.split()[0], **FAMILIES[family], **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # biases start at zero, where an error in them would not show
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids).logits
    return logits


def check_that_upcycling_changes_nothing(model: PreTrainedModel, ids: Tensor, config: MoEConfig) -> None:
    before = logits_of(model, ids)
    upcycle_(model, config)
    # The tolerance would mean nothing if the logits themselves were tiny.
    assert before.std() > 0.1
    assert (logits_of(model, ids) - before).abs().max() <= MAX_LOGIT_DIFFERENCE * max(1.0, float(before.abs().max()))


@pytest.mark.parametrize("router", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_do_not_change(language_model: MakeModel, token_ids: MakeIds, family: str, router: str) -> None:
    model = build(language_model, family)
    check_that_upcycling_changes_nothing(model, token_ids(3, 11, seed=5), MoEConfig(router=router))


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_embeddings_stay_tied(language_model: MakeModel, token_ids: MakeIds, family: str) -> None:
    model = build(language_model, family, tie_word_embeddings=True)
    check_that_upcycling_changes_nothing(model, token_ids(3, 11, seed=5), MoEConfig())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


OPTIONS: dict[str, dict[str, Any]] = {
    "shared": {"shared_expert": True},
    "halves": {"expert_split": 2, "num_experts": 4, "num_experts_per_tok": 2},
    "thirds of two copies": {"expert_split": 3, "num_experts": 12, "num_experts_per_tok": 6},
    "shared halves": {"shared_expert": True, "expert_split": 2, "num_experts": 8, "num_experts_per_tok": 4},
    "sigmoid shared halves": {
        "score": "sigmoid",
        "shared_expert": True,
        "expert_split": 2,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    },
}


# Every preset for one family, and one family for each other form of feed-forward: in one matrix, not gated.
@pytest.mark.parametrize(
    ("family", "router"),
    [
        *(("llama with biases", router) for router in PRESETS),
        ("phi3", "symphony_xmoe"),
        ("starcoder2", "symphony_smoe"),
    ],
)
@pytest.mark.parametrize("option", OPTIONS)
def test_shared_and_split_experts_start_as_the_dense_layer_too(
    language_model: MakeModel, token_ids: MakeIds, family: str, option: str, router: str
) -> None:
    model = build(language_model, family)
    check_that_upcycling_changes_nothing(model, token_ids(3, 11), MoEConfig(router=router, **OPTIONS[option]))


@pytest.mark.parametrize("gate", ["linear", "cosine"])
def test_without_virtual_groups_split_experts_would_not_add_up(
    language_model: MakeModel, gate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that the equal rows of the gate are what makes it exact, and that the proof would notice their absence."""
    monkeypatch.setattr("symphony_vlm.moe.upcycle._tie_rows_of_a_copy_", lambda *_: None)
    with pytest.raises(RuntimeError, match="upcycling changed the logits"):
        upcycle_(language_model(), MoEConfig(gate=gate, expert_split=2))


def test_training_separates_the_slices_of_a_copy(language_model: MakeModel, token_ids: MakeIds) -> None:
    """Rows of the gate that start equal must not stay equal: the slices compute different things."""
    model = language_model().train()
    upcycle_(model, MoEConfig(router="smoe", expert_split=2, num_experts=4))
    gate = model.model.layers[0].mlp.router.gate
    assert torch.equal(gate.weight[0], gate.weight[1]) and not torch.equal(gate.weight[0], gate.weight[2])
    ids = token_ids(4, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    difference = (gate.weight.grad[0] - gate.weight.grad[1]).norm()
    assert difference > 0.1 * gate.weight.grad[:2].norm()


def test_a_shared_expert_is_the_dense_layer_and_its_gate_can_learn(
    language_model: MakeModel, token_ids: MakeIds
) -> None:
    model = language_model().train()
    dense = model.model.layers[0].mlp
    upcycle_(model, MoEConfig(shared_expert=True))
    layer = model.model.layers[0].mlp
    assert layer.shared_expert is dense
    assert not layer.shared_expert_gate.weight.any()
    ids = token_ids(4, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    assert layer.shared_expert_gate.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"expert_split": 2, "num_experts": 5}, "num_experts"),
        ({"expert_split": 2, "num_experts": 6, "num_experts_per_tok": 3}, "num_experts_per_tok"),
        ({"expert_split": 0}, "expert_split"),
        ({"modules": ("speech",)}, "modules"),
        ({"modules": ()}, "modules"),
        ({"modules": ("language", "language")}, "modules"),
        ({"modules": 3}, "modules"),
        ({"shared_expert": 1}, "shared_expert"),
        ({"experts_implementation": "eager"}, "experts_implementation"),
        ({"modules": ("vision",), "router": "similarity_smoe"}, "token_graph"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as error:
        MoEConfig(**settings)
    assert error.value.where == f"moe.{field}"


def test_a_split_that_does_not_divide_the_hidden_size_is_refused_before_anything_changes(
    language_model: MakeModel,
) -> None:
    model = language_model()
    with pytest.raises(InputError, match="5 does not divide the 24 hidden values of decoder layer 0"):
        upcycle_(model, MoEConfig(expert_split=5, num_experts=10, num_experts_per_tok=5))
    assert not list(sparse_layers(model))


def test_the_activation_is_the_models_own(language_model: MakeModel) -> None:
    for family in FAMILIES:
        model = build(language_model, family)
        dense = recognise(model.model.layers[0].mlp, "layer 0")
        upcycle_(model, MoEConfig())
        assert model.model.layers[0].mlp.experts.act_fn is dense.act_fn


class Unknown(nn.Module):
    def __init__(self, *, bias: bool = False, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(4, 8, bias=bias), nn.GELU(), nn.Linear(8, 4)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(8) if norm else nn.Identity()


@pytest.mark.parametrize("settings", [{"bias": False}, {"bias": True, "dropout": 0.1}, {"bias": True, "norm": True}])
def test_parts_whose_effect_experts_would_lack_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"layer 7 has a Unknown \(fc1: Linear, act: GELU, fc2: Linear"):
        recognise(Unknown(**settings), "layer 7")


def test_parts_without_effect_are_no_obstacle() -> None:
    assert recognise(Unknown(bias=True), "layer 7").sizes["intermediate_size"] == 8
