"""When the graph moves and what it counts, in real forward and backward passes of a language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import symphony_vlm as sv
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import ExpertGraph, expert_graphs

MakeModel = Callable[..., PreTrainedModel]
MakeIds = Callable[..., Tensor]


def symphony(language_model: MakeModel, **settings: Any) -> PreTrainedModel:
    model = language_model()
    # Different experts and a strong, quick graph: whatever it does must show in the loss.
    chosen = {"router": "symphony_smoe", "momentum": 0.5, "strength": 0.9, "expert_init_noise": 0.5}
    sv.upcycle_(model, MoEConfig(**(chosen | settings)))
    return model.train()


def graphs_of(model: PreTrainedModel) -> list[ExpertGraph]:
    return [graph for _, graph in expert_graphs(model)]


def step(model: PreTrainedModel, batches: list[Tensor], optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        (loss / len(batches)).backward()
        losses.append(loss.item())
    optimizer.step()
    optimizer.zero_grad()
    sv.update_expert_graphs(model)
    return losses


@pytest.mark.parametrize("counts", ["hard", "soft"])
def test_accumulated_micro_batches_are_one_update_with_all_their_counts(
    language_model: MakeModel, token_ids: MakeIds, counts: str
) -> None:
    ids = token_ids(6, 8)
    whole, split = symphony(language_model, counts=counts), symphony(language_model, counts=counts)
    for model, batches in ((whole, [ids]), (split, list(ids.split(2)))):
        step(model, batches, torch.optim.SGD(model.parameters(), lr=0.0))
    for one, three in zip(graphs_of(whole), graphs_of(split), strict=True):
        assert int(one.num_updates) == int(three.num_updates) == 1
        assert not torch.equal(one.adjacency_EE, torch.eye(4))
        # Hard counts are whole numbers below 2^24 and exact in fp32; soft ones round.
        tolerance = 0.0 if counts == "hard" else 1e-6
        torch.testing.assert_close(one.adjacency_EE, three.adjacency_EE, atol=tolerance, rtol=0)


def test_neither_forward_nor_backward_moves_the_graph(language_model: MakeModel, token_ids: MakeIds) -> None:
    model = symphony(language_model)
    versions = [graph.adjacency_EE._version for graph in graphs_of(model)]
    ids = token_ids(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    assert [graph.adjacency_EE._version for graph in graphs_of(model)] == versions
    assert all(torch.equal(graph.adjacency_EE, torch.eye(4)) for graph in graphs_of(model))


def test_updates_between_steps_leave_later_backward_passes_intact(
    language_model: MakeModel, token_ids: MakeIds
) -> None:
    model = symphony(language_model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = [step(model, [token_ids(2, 8, seed=i)], optimizer) for i in range(3)]
    assert all(int(graph.num_updates) == 3 for graph in graphs_of(model))
    assert torch.tensor(losses).isfinite().all()


def test_evaluation_never_counts(language_model: MakeModel, token_ids: MakeIds) -> None:
    model = symphony(language_model).eval()
    model(input_ids=token_ids(4, 8))
    model.generate(token_ids(1, 4), max_new_tokens=3, do_sample=False)
    sv.update_expert_graphs(model)
    assert all(torch.equal(graph.adjacency_EE, torch.eye(4)) for graph in graphs_of(model))
    assert all(int(graph.num_updates) == 0 for graph in graphs_of(model))


def test_evaluation_between_two_micro_batches_does_not_disturb_the_count(
    language_model: MakeModel, token_ids: MakeIds
) -> None:
    ids = token_ids(4, 8)
    disturbed, quiet = symphony(language_model), symphony(language_model)
    for model in (disturbed, quiet):
        model(input_ids=ids[:2])
        if model is disturbed:
            model.eval()(input_ids=token_ids(5, 8, seed=9))
            model.train()
        model(input_ids=ids[2:])
        sv.update_expert_graphs(model)
    pairs = zip(graphs_of(disturbed), graphs_of(quiet), strict=True)
    assert all(torch.equal(a.adjacency_EE, b.adjacency_EE) for a, b in pairs)


def test_a_frozen_layers_graph_stays_while_the_other_moves(language_model: MakeModel, token_ids: MakeIds) -> None:
    model = symphony(language_model)
    model.model.layers[0].requires_grad_(False)
    step(model, [token_ids(4, 8)], torch.optim.SGD(model.parameters(), lr=0.1))
    frozen, trained = graphs_of(model)
    assert torch.equal(frozen.adjacency_EE, torch.eye(4)) and int(frozen.num_updates) == 0
    assert not torch.equal(trained.adjacency_EE, torch.eye(4)) and int(trained.num_updates) == 1


def test_the_graph_influences_training_once_it_has_moved(language_model: MakeModel, token_ids: MakeIds) -> None:
    ids = token_ids(4, 8)
    first, second = {}, {}
    for router in ("smoe", "symphony_smoe"):
        model = symphony(language_model, router=router)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        first[router], second[router] = (step(model, [ids], optimizer) for _ in range(2))
    assert first["smoe"] == first["symphony_smoe"]
    assert second["smoe"] != second["symphony_smoe"]


@pytest.mark.parametrize("token_graph", ["none", "similarity", "attention"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(
    language_model: MakeModel, token_ids: MakeIds, reentrant: bool, token_graph: str
) -> None:
    """Loss, gradients and graph bit for bit: the recomputation does the same arithmetic and counts nothing."""
    settings: dict[str, Any] = {"token_graph": token_graph}
    if reentrant:  # the next test says why
        settings |= {"balance_loss_weight": 0.0, "z_loss_weight": 0.0}
    ids = [token_ids(2, 8, seed=seed) for seed in range(3)]
    observed = []
    for checkpointing in (False, True):
        model = symphony(language_model, **settings)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        losses = [step(model, ids[:2], optimizer), step(model, ids[1:], optimizer)]
        model(input_ids=ids[0], labels=ids[0]).loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        observed.append((losses, gradients, [g.adjacency_EE for g in graphs_of(model)], list(model.parameters())))
        assert [int(graph.num_updates) for graph in graphs_of(model)] == [2, 2]
    assert observed[0][0] == observed[1][0]
    for plain, checkpointed in zip(observed[0][1:], observed[1][1:], strict=True):
        assert len(plain) == len(checkpointed) > 0
        assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


@pytest.mark.parametrize("weights", [(0.01, 0.0), (0.0, 0.001)])
def test_reentrant_checkpointing_is_refused_where_router_losses_would_be_silent(
    language_model: MakeModel, token_ids: MakeIds, weights: tuple[float, float]
) -> None:
    model = symphony(language_model, balance_loss_weight=weights[0], z_loss_weight=weights[1])
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RuntimeError, match=r"decoder layer 0.*silently inactive.*use_reentrant.*False"):
        model(input_ids=token_ids(2, 8))


def test_a_forward_pass_without_gradients_in_training_mode_is_allowed(
    language_model: MakeModel, token_ids: MakeIds
) -> None:
    with torch.no_grad():
        symphony(language_model)(input_ids=token_ids(2, 8))


@pytest.mark.parametrize("token_graph", ["none", "similarity", "attention"])
def test_packed_documents_count_as_the_same_documents_padded(
    language_model: MakeModel, token_ids: MakeIds, token_graph: str
) -> None:
    """The counts are whole numbers and equal, although the hidden states differ by roundings (1e-6)."""
    first, second = token_ids(1, 25, seed=1), token_ids(1, 21, seed=2)
    positions = torch.cat([torch.arange(25), torch.arange(21)])[None]
    packed = {"input_ids": torch.cat([first, second], 1), "position_ids": positions, "use_cache": False}
    padding = torch.zeros(1, 4, dtype=torch.long)
    rows = torch.cat([first, torch.cat([second, padding], 1)])
    padded = {"input_ids": rows, "attention_mask": torch.tensor([[1] * 25, [1] * 21 + [0] * 4])}
    one_document = {"input_ids": packed["input_ids"], "use_cache": False}
    found = []
    for inputs in (packed, padded, one_document):
        model = symphony(language_model, token_graph=token_graph)
        model(**inputs)
        sv.update_expert_graphs(model)
        found.append([graph.adjacency_EE for graph in graphs_of(model)])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    # Were the second document to see the first, its last layer's choices would be others.
    assert not torch.equal(found[0][-1], found[2][-1])


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_in_16_bits_the_graph_is_the_moving_average_of_its_counts_in_fp32(
    language_model: MakeModel, token_ids: MakeIds, precision: str
) -> None:
    """Against a loop over tokens in fp64. Steps of (1 - 0.99) are small, and 20 of them would show a lost one."""
    model = symphony(language_model, momentum=0.99)
    if precision == "bfloat16":
        model.bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    expected_EE = torch.eye(4, dtype=torch.float64)
    for i in range(20):
        ids = token_ids(2, 8, seed=i)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            model(input_ids=ids, labels=ids).loss.backward()
        counts_EE = torch.zeros(4, 4, dtype=torch.float64)
        recorder: Any = model.routing
        for a, b in recorder.outputs[1].indices_TK.tolist():
            counts_EE[a, b] += 1
            counts_EE[b, a] += 1
        alone_E = counts_EE.sum(1) == 0
        counts_EE[alone_E, alone_E] = 1
        target_EE = 0.1 * torch.eye(4) + 0.9 * counts_EE / counts_EE.sum(1, keepdim=True)
        expected_EE = 0.99 * expected_EE + 0.01 * target_EE
        optimizer.step()
        optimizer.zero_grad()
        sv.update_expert_graphs(model)
    graph = graphs_of(model)[1]
    assert graph.adjacency_EE.dtype == torch.float32 and int(graph.num_updates) == 20
    # 20 steps, each rounding numbers up to 1 by 6e-8 a few times.
    torch.testing.assert_close(graph.adjacency_EE.double(), expected_EE, atol=2e-6, rtol=0)


def test_a_batch_of_nothing_but_padding_is_counted_as_nothing(language_model: MakeModel, token_ids: MakeIds) -> None:
    model = symphony(language_model)
    model(input_ids=token_ids(2, 8), attention_mask=torch.zeros(2, 8, dtype=torch.long))
    recorder: Any = model.routing
    losses = recorder.losses()
    assert all(torch.isfinite(value) for value in losses.values())
    recorder.weighted_loss(losses).backward()
    sv.update_expert_graphs(model)
    assert all(torch.equal(graph.adjacency_EE, torch.eye(4)) for graph in graphs_of(model))
    assert [int(graph.num_updates) for graph in graphs_of(model)] == [0, 0]
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_batch_without_images_that_passes_a_blank_one_for_other_ranks_stays_as_it_is(
    tiny_model_factory: Callable[..., Any], token_ids: MakeIds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, gradients of the language model, graphs and statistics bit for bit; the tower's gradients are zero."""
    everywhere = MoEConfig(
        momentum=0.5, strength=0.9, expert_init_noise=0.5, modules=("language", "projector", "vision")
    )
    ids = token_ids(2, 8)
    observed = []
    for sharded in (False, True):
        model = tiny_model_factory(moe=everywhere).train()
        monkeypatch.setattr(type(model), "_vision_is_sharded", lambda self, sharded=sharded: sharded)
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        sv.update_expert_graphs(model)
        graphs = [(graph.adjacency_EE, int(graph.num_updates)) for graph in graphs_of(model)]
        facts = (output.loss.item(), output.loss_parts.keys(), model.routing.statistics.read())
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        observed.append((facts, graphs, gradients))
        assert model.vision_tower.training and model.projector.training
    (facts, graphs, gradients), (idle_facts, idle_graphs, idle_gradients) = observed
    assert facts == idle_facts
    assert all(torch.equal(a, b) and m == n for (a, m), (b, n) in zip(graphs, idle_graphs, strict=True))
    assert sorted(n for _, n in graphs) == [0, 0, 0, 1, 1]
    for name, gradient in gradients.items():
        if name.startswith("language_model."):
            assert gradient is not None and torch.equal(gradient, idle_gradients[name])
        else:
            assert gradient is None
    routed = [name for name in gradients if "router.gate" in name and not name.startswith("language_model.")]
    assert len(routed) == 3
    assert all(idle_gradients[name] is not None and not idle_gradients[name].any() for name in routed)
