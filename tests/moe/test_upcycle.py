"""Upcycling dense language models: the function stays, the structure changes, everything follows from the seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import symphony_vlm as sv
from symphony_vlm.errors import InputError
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.layer import SparseMoE
from symphony_vlm.moe.recording import sparse_layers
from symphony_vlm.moe.upcycle import upcycle_

MakeModel = Callable[..., PreTrainedModel]
MakeIds = Callable[..., Tensor]


def layers_of(model: PreTrainedModel) -> list[SparseMoE]:
    return [layer for _, layer in sparse_layers(model)]


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids).logits
    return logits


def test_the_feed_forward_layers_matter_in_these_models(language_model: MakeModel, token_ids: MakeIds) -> None:
    """Guards the test above: without its experts the model must give other logits."""
    model = language_model()
    upcycle_(model, MoEConfig())
    before = logits_of(model, token_ids(3, 11))
    with torch.no_grad():
        layers_of(model)[0].experts.down_proj.zero_()
    assert (logits_of(model, token_ids(3, 11)) - before).abs().max() > 0.01


@pytest.mark.parametrize(("layers", "expected"), [("all", [0, 1, 2]), ("alternate", [0, 2]), ((1,), [1])])
def test_only_the_chosen_layers_become_sparse(language_model: MakeModel, layers: Any, expected: list[int]) -> None:
    model = language_model(num_hidden_layers=3)
    upcycle_(model, MoEConfig(layers=layers))
    assert [layer.layer_index for layer in layers_of(model)] == expected
    dense = [i for i in range(3) if i not in expected]
    assert all(type(model.model.layers[i].mlp).__name__ == "LlamaMLP" for i in dense)


def test_every_expert_starts_as_the_dense_layer(language_model: MakeModel) -> None:
    model, dense = language_model(), language_model()
    upcycle_(model, MoEConfig(num_experts=3))
    for layer, original in zip(layers_of(model), dense.model.layers, strict=True):
        for e in range(3):
            gate, up = layer.experts.gate_up_proj[e].chunk(2)
            assert torch.equal(gate, original.mlp.gate_proj.weight)
            assert torch.equal(up, original.mlp.up_proj.weight)
            assert torch.equal(layer.experts.down_proj[e], original.mlp.down_proj.weight)


def test_noise_makes_experts_differ_by_its_relative_size(language_model: MakeModel, token_ids: MakeIds) -> None:
    noise = 0.1
    model, dense = language_model(intermediate_size=256), language_model(intermediate_size=256)
    upcycle_(model, MoEConfig(expert_init_noise=noise))
    assert not torch.allclose(logits_of(model, token_ids(2, 9)), logits_of(dense, token_ids(2, 9)), atol=1e-3)
    for layer, original in zip(layers_of(model), dense.model.layers, strict=True):
        added = layer.experts.down_proj - original.mlp.down_proj.weight
        # 4 x 4096 draws give a standard deviation to about 0.6 %; 3 % is five of them.
        assert added.std().item() == pytest.approx(noise * original.mlp.down_proj.weight.std().item(), rel=0.03)
        assert all(not torch.equal(added[0], added[e]) for e in range(1, 4))


def test_gates_differ_between_layers_and_follow_from_the_seed(language_model: MakeModel) -> None:
    gates = {}
    for run, seed in (("first", 0), ("again", 0), ("other", 1)):
        model = language_model()
        torch.manual_seed(len(gates))  # the global state must not matter
        upcycle_(model, MoEConfig(expert_init_noise=0.01), seed=seed)
        gates[run] = [layer.router.gate.weight for layer in layers_of(model)]
        gates[run] += [layer.experts.down_proj for layer in layers_of(model)]
    assert not torch.equal(gates["first"][0], gates["first"][1])
    assert all(torch.equal(a, b) for a, b in zip(gates["first"], gates["again"], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(gates["first"], gates["other"], strict=True))


def test_the_proof_of_equal_logits_allows_for_the_rounding_of_large_logits(language_model: MakeModel) -> None:
    """Logits in the tens, as pretrained models have them, are rounded at 1e-6 and more in every layer."""
    model = language_model(hidden_size=512, num_hidden_layers=4)
    assert logits_of(model, torch.arange(8)[None]).abs().max() > 20
    upcycle_(model, MoEConfig())


def test_a_new_gate_is_normal_with_the_documented_width(language_model: MakeModel) -> None:
    model = language_model(hidden_size=512, head_dim=8)
    upcycle_(model, MoEConfig(num_experts=8))
    # 4096 draws: 1.1 % standard error; 5 % is more than four of them.
    assert float(layers_of(model)[0].router.gate.weight.std()) == pytest.approx(0.02, rel=0.05)


def test_a_bfloat16_model_gets_bfloat16_experts_and_an_fp32_router(language_model: MakeModel) -> None:
    model = language_model().bfloat16()
    upcycle_(model, MoEConfig())
    for layer in layers_of(model):
        assert layer.experts.down_proj.dtype == torch.bfloat16
        assert layer.router.gate.weight.dtype == torch.float32
        assert layer.router.expert_graph is not None
        assert layer.router.expert_graph.adjacency_EE.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_kept(language_model: MakeModel, training: bool) -> None:
    model = language_model().train(training)
    upcycle_(model, MoEConfig())
    assert {module.training for module in model.modules()} == {training}
    # The proof's own forward passes must leave no trace in the graphs' counts.
    sv.update_expert_graphs(model)
    assert all(
        int(layer.router.expert_graph.num_updates) == 0 for layer in layers_of(model) if layer.router.expert_graph
    )


def tiny(model_type: str, **settings: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=40, **settings))


def test_a_feed_forward_without_a_gate_is_refused_by_name() -> None:
    model = tiny("gpt2", n_embd=16, n_layer=2, n_head=2, n_positions=32)
    with pytest.raises(InputError, match=r"layer 0 has a GPT2MLP \(c_fc: Conv1D"):
        upcycle_(model, MoEConfig())


def test_a_model_without_recognisable_layers_is_refused() -> None:
    model = tiny("opt", hidden_size=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16)
    with pytest.raises(InputError, match="OPTForCausalLM has 0 lists of layers"):
        upcycle_(model, MoEConfig())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts_is_not_upcycled_again(language_model: MakeModel, family: str) -> None:
    model = language_model(family, num_experts_per_tok=2)
    with pytest.raises(InputError, match="decoder layer 0 is a mixture of experts already") as error:
        upcycle_(model, MoEConfig())
    assert "symphonize_" in str(error.value.remedy)
    upcycled = language_model()
    upcycle_(upcycled, MoEConfig())
    with pytest.raises(InputError, match="already has sparse layers"):
        upcycle_(upcycled, MoEConfig())


def test_a_language_model_has_no_vision_tower_to_put_experts_into(language_model: MakeModel) -> None:
    with pytest.raises(InputError, match="LlamaForCausalLM has no 'vision'"):
        upcycle_(language_model(), MoEConfig(modules=("language", "vision")))


def test_a_conversion_that_changed_the_logits_would_be_an_error(
    language_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(stacked: Tensor, weight: Tensor, *_: Any) -> None:
        stacked.copy_(1.01 * weight.expand_as(stacked))

    monkeypatch.setattr("symphony_vlm.moe.upcycle._copy_to_experts", spoiled)
    with pytest.raises(RuntimeError, match="upcycling changed the logits by"):
        upcycle_(language_model(), MoEConfig())


def test_an_upcycled_model_generates(language_model: MakeModel, token_ids: MakeIds) -> None:
    model, dense = language_model(), language_model()
    upcycle_(model, MoEConfig())
    ids = token_ids(1, 5)
    generated = [m.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None) for m in (model, dense)]
    assert torch.equal(*generated)
