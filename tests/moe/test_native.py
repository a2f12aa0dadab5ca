"""Taking over the routers of transformers' own mixtures of experts, and calibrating graphs after the fact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

import symphony_vlm as sv
from symphony_vlm.errors import InputError
from symphony_vlm.moe import native
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import SymphonyGraph, expert_graphs, normalize_counts
from symphony_vlm.moe.proof import MAX_LOGIT_DIFFERENCE
from symphony_vlm.moe.recording import sparse_layers

MakeModel = Callable[..., PreTrainedModel]
MakeIds = Callable[..., Tensor]

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12},
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 8},
    "olmoe": {"num_experts": 4},
}
RENORMALIZED = {"mixtral": [True], "qwen2_moe": [False, True], "qwen3_moe": [False, True], "olmoe": [False, True]}
CASES = [(family, renormalize) for family in FAMILIES for renormalize in RENORMALIZED[family]]


def build(language_model: MakeModel, family: str, **settings: Any) -> PreTrainedModel:
    if family != "mixtral":
        settings.setdefault("norm_topk_prob", False)
    return language_model(family, num_experts_per_tok=2, **FAMILIES[family], **settings)


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids).logits
    return logits


def set_graphs(model: PreTrainedModel, seed: int = 0) -> None:
    """Graphs as data would have left them."""
    generator = torch.Generator().manual_seed(seed)
    for _, graph in expert_graphs(model):
        rows = torch.rand(graph.adjacency_EE.shape, generator=generator)
        graph.adjacency_EE.copy_(rows / rows.sum(1, keepdim=True))


@pytest.mark.parametrize("router", ["smoe", "symphony_smoe"])
@pytest.mark.parametrize(("family", "renormalize"), CASES)
def test_logits_do_not_change(
    language_model: MakeModel, token_ids: MakeIds, family: str, renormalize: bool, router: str
) -> None:
    settings = {} if family == "mixtral" else {"norm_topk_prob": renormalize}
    model = build(language_model, family, **settings)
    ids = token_ids(3, 11)
    before = logits_of(model, ids)
    sv.symphonize_(model, MoEConfig(router=router))
    config = model.routing.config
    assert (config.num_experts_per_tok, config.renormalize) == (2, renormalize)
    assert config.num_experts == FAMILIES[family].get("num_experts", 4)
    assert before.std() > 0.1
    assert (logits_of(model, ids) - before).abs().max() <= MAX_LOGIT_DIFFERENCE * max(1.0, float(before.abs().max()))


def test_renormalisation_matters_in_these_models(language_model: MakeModel, token_ids: MakeIds) -> None:
    """Guards the test above: the two semantics must give different logits."""
    logits = [
        logits_of(build(language_model, "qwen3_moe", norm_topk_prob=value), token_ids(3, 11)) for value in (False, True)
    ]
    assert (logits[0] - logits[1]).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_gate_and_experts_are_taken_over_and_not_copied(language_model: MakeModel, family: str) -> None:
    model = build(language_model, family)
    blocks = [layer.mlp for layer in model.model.layers]
    sv.symphonize_(model)
    for (_, layer), block in zip(sparse_layers(model), blocks, strict=True):
        assert layer.experts.gate_up_proj is block.experts.gate_up_proj
        assert layer.experts.down_proj is block.experts.down_proj
        assert layer.router.gate.weight is block.gate.weight
        assert layer.shared_expert is getattr(block, "shared_expert", None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_changes_the_decision_as_the_formula_says(
    language_model: MakeModel, token_ids: MakeIds, family: str
) -> None:
    model = build(language_model, family)
    ids = token_ids(2, 9)
    before = logits_of(model, ids)
    sv.symphonize_(model)
    set_graphs(model)
    assert (logits_of(model, ids) - before).abs().max() > 1e-3
    layer = model.model.layers[0].mlp
    out = model.routing.outputs[0]
    expected_TE = out.logits_TE.softmax(-1) @ layer.router.expert_graph.adjacency_EE.T
    torch.testing.assert_close(out.scores_TE, expected_TE, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_with_its_own_losses_once_and_moves_its_graphs(
    language_model: MakeModel, token_ids: MakeIds, family: str
) -> None:
    """`output_router_logits` in the configuration would make the class add a balance loss of its own."""
    model = build(language_model, family, output_router_logits=True).train()
    sv.symphonize_(model, MoEConfig(momentum=0.5))
    ids = token_ids(4, 9)
    out = model(input_ids=ids, labels=ids)
    cross_entropy = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    router = model.routing.weighted_loss(model.routing.losses())
    # Sums over 32 tokens of fp32 logits of size 10, in another order.
    torch.testing.assert_close(out.loss, cross_entropy + router, atol=1e-5, rtol=1e-5)
    out.loss.backward()
    sv.update_expert_graphs(model)
    for _, layer in sparse_layers(model):
        assert layer.router.gate.weight.grad.abs().max() > 0
        assert int(layer.router.expert_graph.num_updates) == 1
        assert not torch.equal(layer.router.expert_graph.adjacency_EE, torch.eye(model.routing.config.num_experts))
    assert set(model.routing.statistics.read()) == {0, 1}
    with pytest.raises(InputError, match="router logits"):
        model(input_ids=ids, output_router_logits=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_saved_and_opened_with_graphs_and_all(
    language_model: MakeModel, token_ids: MakeIds, family: str, tmp_path: Path
) -> None:
    build(language_model, family).save_pretrained(tmp_path / "stock")
    # From a file, where the library keeps the experts apart and joins them while loading.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    sv.symphonize_(model)
    set_graphs(model)
    expected = logits_of(model, token_ids(2, 9))
    model.save_pretrained(tmp_path / "saved")
    opened = sv.load_language_model(tmp_path / "saved")
    assert torch.equal(logits_of(opened, token_ids(2, 9)), expected)
    opened.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(sv.load_language_model(tmp_path / "again"), token_ids(2, 9)), expected)
    ids = token_ids(2, 5)
    answers = [m.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None) for m in (model, opened)]
    assert torch.equal(*answers)


def test_dense_layers_between_the_sparse_ones_stay(language_model: MakeModel, token_ids: MakeIds) -> None:
    model = build(language_model, "qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2)
    before = logits_of(model, token_ids(2, 9))
    sv.symphonize_(model)
    assert [layer.layer_index for _, layer in sparse_layers(model)] == [1, 3] == list(model.routing.config.layers)
    torch.testing.assert_close(logits_of(model, token_ids(2, 9)), before, atol=1e-5, rtol=1e-5)


def test_some_of_the_layers_can_keep_their_own_routers(language_model: MakeModel, token_ids: MakeIds) -> None:
    model = build(language_model, "mixtral", num_hidden_layers=3)
    sv.symphonize_(model, MoEConfig(layers=(0, 2)))
    assert type(model.model.layers[1].mlp).__name__ == "MixtralSparseMoeBlock"
    model(input_ids=token_ids(1, 4))
    assert set(model.routing.outputs) == {0, 2}


def test_a_sixteen_bit_gate_is_lifted_to_thirty_two(language_model: MakeModel, token_ids: MakeIds) -> None:
    model = build(language_model, "mixtral").bfloat16()
    ids = token_ids(2, 9)
    before = logits_of(model, ids).float()
    sv.symphonize_(model)
    for _, layer in sparse_layers(model):
        assert layer.router.gate.weight.dtype == torch.float32
        assert layer.experts.down_proj.dtype == torch.bfloat16
    # Only a sanity check: 8 bits of mantissa in logits of this size, over two layers.
    assert (logits_of(model, ids).float() - before).abs().median() < 0.05 * before.abs().max()


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"router": "xmoe"}, "gate"),
        ({"router": "similarity_smoe"}, "token_graph"),
        ({"expert_graph": "learnable"}, "expert_graph"),
        ({"score": "sigmoid"}, "score"),
        ({"expert_split": 2}, "expert_split"),
        ({"expert_init_noise": 0.1}, "expert_init_noise"),
        ({"modules": ("language", "vision")}, "modules"),
    ],
)
def test_settings_that_would_change_a_trained_model_are_refused(
    language_model: MakeModel, settings: dict[str, Any], field: str
) -> None:
    model = build(language_model, "mixtral")
    with pytest.raises(InputError) as error:
        sv.symphonize_(model, MoEConfig(**settings))
    assert error.value.where == f"moe.{field}"
    assert not list(sparse_layers(model))


def test_a_model_that_has_none_or_others_is_refused(language_model: MakeModel) -> None:
    with pytest.raises(InputError, match="LlamaForCausalLM has no sparse layers of transformers"):
        sv.symphonize_(language_model())
    # DeepSeek-V3 chooses among groups of experts and with a correction that is not in the logits.
    deepseek = language_model(
        "deepseek_v3",
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=8,
        first_k_dense_replace=0,
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        num_key_value_heads=2,
    )
    with pytest.raises(InputError, match=r"decoder layer 0 is a DeepseekV3MoE with .*e_score_correction_bias"):
        sv.symphonize_(deepseek)


def test_a_conversion_that_changed_the_logits_would_be_an_error(
    language_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = native.install_moe_

    def spoiled(model: PreTrainedModel, config: MoEConfig) -> Any:
        recorder = real(model, config)
        set_graphs(model)
        return recorder

    monkeypatch.setattr(native, "install_moe_", spoiled)
    with pytest.raises(RuntimeError, match="taking over the routers changed the logits"):
        sv.symphonize_(build(language_model, "mixtral"))


# Calibration.


def batches_of(token_ids: MakeIds) -> list[dict[str, Tensor]]:
    ids = [token_ids(2, 9, seed=seed) for seed in range(3)]
    masks = [torch.ones_like(row) for row in ids]
    masks[1][0, 5:] = 0
    return [{"input_ids": row, "attention_mask": mask} for row, mask in zip(ids, masks, strict=True)]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "llama"])
def test_calibration_sets_the_graph_of_the_plain_routers_choices(
    language_model: MakeModel, token_ids: MakeIds, family: str
) -> None:
    if family == "llama":
        model = language_model()
        sv.upcycle_(model, MoEConfig(active="eval"))
    else:
        model = build(language_model, family)
        sv.symphonize_(model, MoEConfig(active="eval"))
    model.requires_grad_(False)
    batches = batches_of(token_ids)
    num_experts = model.routing.config.num_experts
    counts = {layer: torch.zeros(num_experts, num_experts) for layer in (0, 1)}
    for batch in batches:
        model(**batch)
        for layer, out in model.routing.outputs.items():
            for chosen, real in zip(out.indices_TK.tolist(), batch["attention_mask"].flatten().tolist(), strict=True):
                for i in chosen:
                    for j in chosen:
                        counts[layer][i, j] += real
    weights = {name: tensor.clone() for name, tensor in model.named_parameters()}

    set_graphs(model, seed=5)  # whatever was there before does not enter
    sv.calibrate_expert_graphs_(model, batches)
    tokens = torch.tensor(float(sum(batch["attention_mask"].sum() for batch in batches)))
    for layer, (_, graph) in enumerate(expert_graphs(model)):
        assert isinstance(graph, SymphonyGraph)
        expected_EE = normalize_counts(counts[layer], tokens, graph.config)
        torch.testing.assert_close(graph.adjacency_EE, expected_EE, atol=1e-6, rtol=0)
        assert int(graph.num_updates) == 1
        assert not graph.take_counts().any()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.named_parameters())
    assert not model.training


def test_calibrating_twice_gives_the_same(language_model: MakeModel, token_ids: MakeIds) -> None:
    model = build(language_model, "mixtral").train()
    sv.symphonize_(model)
    results = []
    for _ in range(2):
        sv.calibrate_expert_graphs_(model, batches_of(token_ids))
        results.append([graph.adjacency_EE.clone() for _, graph in expert_graphs(model)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert model.training
    # Counting ends with the calibration: evaluation mode changes nothing any more.
    model.eval()(**batches_of(token_ids)[0])
    assert not any(graph.take_counts().any() for _, graph in expert_graphs(model))


def test_with_active_eval_the_calibrated_graph_acts_in_evaluation_alone(
    language_model: MakeModel, token_ids: MakeIds
) -> None:
    model = build(language_model, "mixtral")
    ids = token_ids(2, 9)
    plain = logits_of(model, ids)
    sv.symphonize_(model, MoEConfig(active="eval", strength=1.0))
    sv.calibrate_expert_graphs_(model, batches_of(token_ids))
    assert (logits_of(model, ids) - plain).abs().max() > 1e-3
    torch.testing.assert_close(logits_of(model.train(), ids), plain, atol=1e-5, rtol=1e-5)


def test_calibration_without_graph_or_data_is_refused(language_model: MakeModel) -> None:
    with pytest.raises(InputError, match="no expert graph that is counted"):
        sv.calibrate_expert_graphs_(language_model(), [{}])
    model = language_model()
    sv.upcycle_(model, MoEConfig())
    with pytest.raises(InputError, match="no batch"):
        sv.calibrate_expert_graphs_(model, [])
