"""What travels beside the forward pass of a language model: router losses, statistics, the record itself."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import symphony_vlm as sv
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import expert_graphs
from symphony_vlm.moe.losses import load_balancing_loss, router_z_loss
from symphony_vlm.moe.router import RouterOutput
from symphony_vlm.moe.statistics import LoadStatistics, graph_statistics

MakeModel = Callable[..., PreTrainedModel]
MakeIds = Callable[..., Tensor]


def upcycled(language_model: MakeModel, **settings: Any) -> PreTrainedModel:
    model = language_model()
    sv.upcycle_(model, MoEConfig(**settings))
    return model


def test_a_bare_language_model_gets_the_router_losses_added_to_its_own(
    language_model: MakeModel, token_ids: MakeIds
) -> None:
    model, dense = upcycled(language_model), language_model()
    ids = token_ids(2, 9)
    total = model(input_ids=ids, labels=ids).loss
    cross_entropy = dense(input_ids=ids, labels=ids).loss
    router = model.routing.weighted_loss(model.routing.losses())
    # Cross entropies of about 10 of models whose logits agree to 1e-5.
    torch.testing.assert_close(total, cross_entropy + router, atol=2e-5, rtol=0)
    assert router > 0


@pytest.mark.parametrize(("name", "part"), [("balance_loss_weight", "balance"), ("z_loss_weight", "z")])
def test_doubling_a_weight_doubles_its_term_and_no_other(
    language_model: MakeModel, token_ids: MakeIds, name: str, part: str
) -> None:
    ids = token_ids(2, 9)
    totals, parts = [], []
    for weight in (0.0, 0.5, 1.0):
        model = upcycled(language_model, **{name: weight})
        totals.append(model(input_ids=ids, labels=ids).loss)
        parts.append(model.routing.losses()[part])
    assert torch.equal(parts[1], parts[2])
    torch.testing.assert_close(totals[2] - totals[0], 2 * (totals[1] - totals[0]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(totals[2] - totals[0], parts[2], atol=1e-5, rtol=1e-5)


def test_losses_are_the_pure_functions_of_the_record_averaged_over_layers(
    language_model: MakeModel, token_ids: MakeIds
) -> None:
    model = upcycled(language_model)
    ids = token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    model(input_ids=ids, attention_mask=mask)
    losses = model.routing.losses()
    for kind, function in (("balance", load_balancing_loss), ("z", router_z_loss)):
        per_layer = []
        for layer, out in model.routing.outputs.items():
            extra = {"indices_TK": out.indices_TK} if kind == "balance" else {}
            per_layer.append(function(logits_TE=out.logits_TE, token_mask_T=mask.flatten().bool(), **extra))
            assert torch.equal(losses[f"{kind}/{layer}"], per_layer[-1])
        torch.testing.assert_close(losses[kind], sum(per_layer) / len(per_layer))
    assert set(losses) == {"balance", "z", "balance/0", "z/0", "balance/1", "z/1"}


def test_the_balance_loss_alone_moves_every_gate(language_model: MakeModel, token_ids: MakeIds) -> None:
    model = upcycled(language_model).train()
    model(input_ids=token_ids(4, 9))
    model.routing.losses()["balance"].backward()
    for name, parameter in model.named_parameters():
        if "router.gate" in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0


@pytest.mark.parametrize("lengths", [(9, 3), (5, 5)])
def test_accumulated_micro_batches_weigh_router_losses_like_the_cross_entropy(
    language_model: MakeModel, token_ids: MakeIds, lengths: tuple[int, int]
) -> None:
    """With the step's number of tokens given, micro-batch losses must add up to one step's loss, not to several."""
    model = upcycled(language_model)
    batches = [token_ids(2, length, seed=length) for length in lengths]
    tokens = [ids[:, 1:].numel() for ids in batches]
    shares = sum(model(input_ids=ids, labels=ids, num_items_in_batch=sum(tokens)).loss for ids in batches)
    means = [model(input_ids=ids, labels=ids).loss for ids in batches]
    expected = sum(mean * count for mean, count in zip(means, tokens, strict=True)) / sum(tokens)
    torch.testing.assert_close(shares, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_enters_neither_losses_nor_counts_nor_statistics(
    language_model: MakeModel, token_ids: MakeIds, side: str, positional: bool
) -> None:
    model = upcycled(language_model, router="symphony_smoe").train()
    ids = token_ids(1, 6)
    pad = torch.zeros(1, 4, dtype=torch.long)
    columns = [pad, ids] if side == "left" else [ids, pad]
    padded = torch.cat(columns, dim=1)
    mask = (torch.cat([torch.zeros_like(pad), torch.ones_like(ids)], 1)) if side == "left" else (padded > 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    observed = []
    for arguments in ((ids, torch.ones_like(ids)), (padded, mask)):
        more = {"position_ids": positions if arguments[0] is padded else None}
        model(*arguments, **more) if positional else model(input_ids=arguments[0], attention_mask=arguments[1], **more)
        counts = [graph.take_counts() for _, graph in expert_graphs(model)]
        observed.append((model.routing.losses(), counts, model.routing.statistics.read()))
    (losses, counts, statistics), (padded_losses, padded_counts, padded_statistics) = observed
    # The same tokens in another position of the batch: rounding of fp32 sums.
    torch.testing.assert_close(padded_losses, losses, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(counts, padded_counts, strict=True))
    assert all(statistics[layer]["load"] == padded_statistics[layer]["load"] for layer in statistics)
    assert {padded_statistics[layer]["tokens"] for layer in statistics} == {6}


def test_with_a_cache_the_mask_of_the_new_tokens_is_used(language_model: MakeModel, token_ids: MakeIds) -> None:
    model = upcycled(language_model)
    ids = token_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    cache = model(input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
    assert model.routing.token_mask_T.tolist() == [False, False, True, True] + [True] * 4
    model(input_ids=ids[:, 4:], attention_mask=mask, past_key_values=cache)
    assert model.routing.token_mask_T.tolist() == [True] * 4


def test_a_new_forward_pass_opens_a_fresh_record(language_model: MakeModel, token_ids: MakeIds) -> None:
    model = upcycled(language_model)
    model(input_ids=token_ids(2, 9))
    first = model.routing.outputs
    model(input_ids=token_ids(1, 4))
    assert {len(out.indices_TK) for out in first.values()} == {18}
    assert {len(out.indices_TK) for out in model.routing.outputs.values()} == {4}


def test_a_failing_forward_pass_shows_its_own_error_and_is_not_counted(
    language_model: MakeModel, token_ids: MakeIds
) -> None:
    model = upcycled(language_model, router="symphony_smoe").train()

    def fail(*_: Any) -> None:
        raise KeyError("out of memory, say")

    # After the last sparse layer: the record is complete although the pass is not.
    handle = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="out of memory"):
        model(input_ids=token_ids(2, 9))
    handle.remove()
    assert not any(graph.take_counts().any() for _, graph in expert_graphs(model))
    assert model.routing.statistics.read() == {}
    assert all(layer.mlp.routed is None for layer in model.model.layers)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_after_a_forward_pass_is_complete_and_independent(
    language_model: MakeModel, token_ids: MakeIds, duplicate: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    model = upcycled(language_model, router="symphony_smoe").train()
    ids = token_ids(2, 9)
    model(input_ids=ids, labels=ids)
    twin = duplicate(model)
    assert twin.routing is not model.routing and twin.routing.outputs == {}
    loss = twin(input_ids=ids, labels=ids).loss
    assert torch.equal(loss, model(input_ids=ids, labels=ids).loss)
    assert set(twin.routing.outputs) == {0, 1}
    sv.update_expert_graphs(twin)
    assert [int(graph.num_updates) for _, graph in expert_graphs(twin)] == [1, 1]
    assert [int(graph.num_updates) for _, graph in expert_graphs(model)] == [0, 0]


@pytest.mark.parametrize("gate", ["linear", "cosine"])
@pytest.mark.parametrize("trained", [True, False])
def test_a_graph_is_counted_where_any_part_of_the_gate_is_trained(
    language_model: MakeModel, token_ids: MakeIds, gate: str, trained: bool
) -> None:
    model = upcycled(language_model, router="symphony_smoe", gate=gate).train()
    for layer in model.model.layers:
        layer.mlp.router.gate.requires_grad_(False)
        last = list(layer.mlp.router.gate.parameters())[-1]
        last.requires_grad_(trained)
    model(input_ids=token_ids(2, 9))
    sv.update_expert_graphs(model)
    assert [int(graph.num_updates) for _, graph in expert_graphs(model)] == [int(trained)] * 2


@pytest.mark.parametrize("kind", ["learnable", "fixed"])
def test_a_graph_that_is_not_counted_is_described_all_the_same(
    language_model: MakeModel, token_ids: MakeIds, kind: str
) -> None:
    model = upcycled(language_model, expert_graph=kind).train()
    ids = token_ids(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    sv.update_expert_graphs(model)
    for described in graph_statistics(model).values():
        assert described["self_weight"] == pytest.approx(0.9 if kind == "learnable" else 1.0, abs=1e-6)
        assert described["num_updates"] == 0


def routed(num_tokens: int = 30, num_experts: int = 4, seed: int = 0) -> RouterOutput:
    logits_TE = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    top = logits_TE.softmax(-1).topk(2)
    return RouterOutput(
        weights_TK=top.values, indices_TK=top.indices, logits_TE=logits_TE, scores_TE=logits_TE.softmax(-1)
    )


def test_statistics_are_those_of_all_tokens_added_and_are_read_once() -> None:
    outputs = [routed(30, seed=0), routed(20, seed=1)]
    mask_T = torch.arange(20) % 4 != 0
    statistics = LoadStatistics()
    statistics.add(3, outputs[0], None)
    statistics.add(3, outputs[1], mask_T)
    result = statistics.read()[3]

    rows = [(out, t) for out, mask in zip(outputs, (torch.ones(30), mask_T), strict=True) for t in mask.nonzero()]
    counts, gates, entropy = [0] * 4, [0.0] * 4, 0.0
    for out, t in rows:
        probs = out.logits_TE[t].softmax(-1).flatten().tolist()
        entropy -= sum(p * math.log(p) for p in probs) / len(rows)
        gates = [g + p / len(rows) for g, p in zip(gates, probs, strict=True)]
        for e in out.indices_TK[t].flatten().tolist():
            counts[e] += 1
    load = [count / sum(counts) for count in counts]
    assert result["tokens"] == len(rows) == 45
    assert result["load"] == pytest.approx(load, abs=1e-6)
    spread = math.sqrt(sum((x - 0.25) ** 2 for x in load) / 4)
    assert result["load_cv"] == pytest.approx(spread / 0.25, rel=1e-5)
    assert result["token_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert result["gate_entropy"] == pytest.approx(-sum(g * math.log(g) for g in gates), rel=1e-5)
    assert statistics.read() == {}


def test_graph_statistics_describe_the_matrix(language_model: MakeModel) -> None:
    model = upcycled(language_model, router="symphony_smoe", num_experts=3)
    (name, graph), *_ = expert_graphs(model)
    matrix = [[0.6, 0.4, 0.0], [0.4, 0.6, 0.0], [0.0, 0.0, 1.0]]
    graph.adjacency_EE.copy_(torch.tensor(matrix))
    described = graph_statistics(model)[name]
    assert described["adjacency"] == [pytest.approx(row, abs=1e-6) for row in matrix]
    assert described["self_weight"] == pytest.approx(2.2 / 3)
    # Eigenvalues 1, 1, 0.2: two communities, no gap. The edge from 0 to 1 and back is all there is.
    assert described["spectral_gap"] == pytest.approx(0.0, abs=1e-6)
    assert described["top_edges"] == [(0, 1, pytest.approx(0.4)), (1, 0, pytest.approx(0.4))]
