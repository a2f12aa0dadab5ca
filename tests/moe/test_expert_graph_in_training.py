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


def test_activation_checkpointing_changes_nothing(language_model: MakeModel, token_ids: MakeIds) -> None:
    """Loss, gradients and graph bit for bit: the recomputation does the same arithmetic and counts nothing."""
    ids = [token_ids(2, 8, seed=seed) for seed in range(3)]
    observed = []
    for checkpointing in (False, True):
        model = symphony(language_model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
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


def test_reentrant_checkpointing_is_refused_because_router_losses_would_be_silent(
    language_model: MakeModel, token_ids: MakeIds
) -> None:
    model = symphony(language_model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RuntimeError, match=r"decoder layer 0.*silently inactive.*use_reentrant.*False"):
        model(input_ids=token_ids(2, 8))


def test_a_forward_pass_without_gradients_in_training_mode_is_allowed(
    language_model: MakeModel, token_ids: MakeIds
) -> None:
    with torch.no_grad():
        symphony(language_model)(input_ids=token_ids(2, 8))
