"""Routing statistics: against formulae, without host synchronisation, and over processes.

What `LoadStatistics` adds up over the passes of a model is in ``test_recording.py``.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import expert_graphs, normalize_counts, update_expert_graphs
from symphony_vlm.moe.layer import SparseMoE
from symphony_vlm.moe.router import RouterOutput
from symphony_vlm.moe.statistics import GraphDrift, LoadStatistics, expert_distance, graph_statistics


def routed(logits_TE: Tensor, k: int = 2) -> RouterOutput:
    top = logits_TE.softmax(-1).topk(k)
    return RouterOutput(
        weights_TK=top.values, indices_TK=top.indices, logits_TE=logits_TE, scores_TE=logits_TE.softmax(-1)
    )


def read(*logits_TE: Tensor, k: int = 2) -> dict[str, object]:
    statistics = LoadStatistics()
    for logits in logits_TE:
        statistics.add(0, routed(logits, k), None)
    return statistics.read()[0]


class Layers(nn.Module):
    """Two sparse layers with an expert graph."""

    def __init__(self, **settings: object) -> None:
        super().__init__()
        config = MoEConfig(**({"router": "symphony_smoe"} | settings))  # type: ignore[arg-type]
        sizes = {"hidden_size": 8, "intermediate_size": 8, "hidden_act": "silu"}
        self.layers = nn.ModuleList(SparseMoE(config, layer_index=i, **sizes) for i in range(2))
        self.config = config


def count(model: Layers, counts_EE: Tensor) -> None:
    """Gives every layer these co-selection counts (a matrix S^T S with S = the factor of it) and takes a step."""
    for _, graph in expert_graphs(model):
        graph.count(torch.linalg.cholesky(counts_EE, upper=True))  # type: ignore[operator]
    update_expert_graphs(model)


# Load and entropy.


def test_an_even_gate_has_the_entropy_of_all_experts_and_a_sure_one_none() -> None:
    num_experts = 8
    even = read(torch.zeros(16, num_experts))
    assert even["gate_entropy"] == pytest.approx(math.log(num_experts), rel=1e-6)
    assert even["token_entropy"] == pytest.approx(math.log(num_experts), rel=1e-6)
    # Every token sure of another expert: each knows its own, together they use all. 1e4: the others' p is 0 in fp32.
    sure = read(1e4 * torch.eye(num_experts), k=1)
    assert sure["token_entropy"] == 0.0
    assert sure["gate_entropy"] == pytest.approx(math.log(num_experts), rel=1e-6)
    assert sure["load_cv"] == 0.0


@pytest.mark.parametrize(("num_experts", "k"), [(4, 1), (8, 2), (64, 8)])
def test_a_collapsed_router_has_the_variation_of_k_used_experts(num_experts: int, k: int) -> None:
    logits_TE = torch.zeros(10, num_experts)
    logits_TE[:, :k] = 5.0
    found = read(logits_TE, k=k)
    assert found["load"] == pytest.approx([1 / k] * k + [0.0] * (num_experts - k), abs=1e-6)
    # Shares 1/k and 0 with mean 1/E: the variance is 1/(kE) - 1/E^2.
    assert found["load_cv"] == pytest.approx(math.sqrt(num_experts / k - 1), rel=1e-5)


def test_a_single_expert_has_no_variation_and_no_entropy() -> None:
    found = read(torch.randn(5, 1), k=1)
    assert (found["load"], found["load_cv"], found["gate_entropy"], found["token_entropy"]) == ([1.0], 0.0, 0.0, 0.0)


def test_every_choice_of_every_token_is_in_the_load() -> None:
    """None is dropped: the shares are whole numbers over T * K."""
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(50, 8, generator=generator) * 4
    chosen = torch.bincount(routed(logits_TE).indices_TK.flatten(), minlength=8)
    found = read(logits_TE)
    assert found["tokens"] == 50
    assert found["load"] == pytest.approx((chosen / 100).tolist(), abs=1e-6)


def test_adding_and_stepping_read_nothing_back_from_the_device() -> None:
    """On the meta device there is nothing to read: ``item``, ``bool`` or ``tolist`` would raise."""
    statistics = LoadStatistics()
    logits_TE = torch.empty(12, 4, device="meta")
    for mask_T in (None, torch.empty(12, dtype=torch.bool, device="meta")):
        statistics.add(0, routed(logits_TE), mask_T)
    drift = GraphDrift(Layers().to("meta"))
    drift.step()
    with pytest.raises((NotImplementedError, RuntimeError)):
        statistics.read()
    with pytest.raises((NotImplementedError, RuntimeError)):
        drift.read()


def test_adding_keeps_no_graph_of_the_router() -> None:
    logits_TE = torch.randn(6, 4, requires_grad=True)
    statistics = LoadStatistics()
    statistics.add(0, routed(logits_TE), None)
    assert not any(values.requires_grad for values in statistics._sums.values())


_WORKER = """
import json, sys
import torch
import torch.distributed as dist
from symphony_vlm.moe.router import RouterOutput
from symphony_vlm.moe.statistics import LoadStatistics

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)

def routed(rows):
    logits = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
    top = logits.softmax(-1).topk(2)
    return RouterOutput(weights_TK=top.values, indices_TK=top.indices, logits_TE=logits, scores_TE=logits.softmax(-1))

statistics = LoadStatistics()
statistics.add(0, routed(20 + rank), None)
if rank == 0:
    statistics.add("vision.1", routed(30), None)
print(json.dumps({str(layer): values for layer, values in statistics.read().items()}))
assert statistics.read() == {}
dist.destroy_process_group()
"""


def test_processes_read_the_statistics_of_all_their_tokens(tmp_path: Path) -> None:
    """Also of a layer that only one of them has run."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(tmp_path), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results[0][1] + results[1][1]
    outputs = [out.splitlines()[-1] for out, _ in results]
    assert outputs[0] == outputs[1]

    def logits(rows: int) -> Tensor:
        return torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))

    found = json.loads(outputs[0])
    for layer, expected in (("0", read(logits(20), logits(21))), ("vision.1", read(logits(30)))):
        assert found[layer]["tokens"] == expected["tokens"]
        assert found[layer]["load"] == expected["load"]
        # Sums of fp32 in another order.
        for name in ("load_cv", "gate_entropy", "token_entropy"):
            assert found[layer][name] == pytest.approx(expected[name], rel=1e-5)


# Graphs.


def test_drift_is_the_mean_length_of_the_moving_averages_steps() -> None:
    """With the same counts at every step, A_t - A_{t-1} = (1 - m) m^(t-1) (A_hat - I)."""
    momentum, steps = 0.8, 5
    model = Layers(momentum=momentum)
    counts_EE = torch.tensor([[4.0, 1, 0, 2], [1, 3, 1, 0], [0, 1, 5, 1], [2, 0, 1, 4]])
    target_EE = normalize_counts(counts_EE, torch.tensor(8.0), model.config)
    distance = float((target_EE - torch.eye(4)).norm())
    drift = GraphDrift(model)
    for _ in range(steps):
        count(model, counts_EE)
        drift.step()
    found = drift.read()
    assert set(found) == set(graph_statistics(model))
    for value in found.values():
        # fp32 entries near 1, whose differences are some 1e-2.
        assert value == pytest.approx((1 - momentum**steps) / steps * distance, rel=1e-4)
    count(model, counts_EE)
    drift.step()
    assert list(drift.read().values()) == pytest.approx([(1 - momentum) * momentum**steps * distance] * 2, rel=1e-4)


def test_a_graph_at_rest_has_no_drift_and_nothing_is_reported_without_a_step() -> None:
    model = Layers()
    drift = GraphDrift(model)
    assert drift.read() == {}
    update_expert_graphs(model)  # no tokens: the graphs stay
    drift.step()
    assert set(drift.read().values()) == {0.0}
    assert GraphDrift(Layers(router="smoe")).read() == {}


def test_drift_sees_a_graph_that_the_optimizer_moves() -> None:
    model = Layers(expert_graph="learnable")
    for layer in model.layers:
        layer.reset()
    drift = GraphDrift(model)
    before = [graph.adjacency_EE.detach().clone() for _, graph in expert_graphs(model)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    drift.step()
    after = [graph.adjacency_EE.detach() for _, graph in expert_graphs(model)]
    lengths = [float((b - a).norm()) for a, b in zip(before, after, strict=True)]
    assert list(drift.read().values()) == pytest.approx(lengths, rel=1e-6)
    assert min(lengths) > 1e-3


@pytest.mark.parametrize(
    ("matrix", "gap"),
    [
        # Eigenvalues: all 1 (no two experts linked); 1, 0, 0, 0 (one step forgets the start); 1 and 1 - 2p.
        (torch.eye(4), 0.0),
        (torch.full((4, 4), 0.25), 1.0),
        (torch.tensor([[0.9, 0.1], [0.1, 0.9]]), 0.2),
    ],
)
def test_the_spectral_gap_tells_how_fast_a_walk_on_the_graph_mixes(matrix: Tensor, gap: float) -> None:
    model = Layers(num_experts=len(matrix))
    for _, graph in expert_graphs(model):
        graph.adjacency_EE.copy_(matrix)
    for found in graph_statistics(model).values():
        assert found["spectral_gap"] == pytest.approx(gap, abs=1e-6)
        assert found["self_weight"] == pytest.approx(float(matrix.diagonal().mean()), abs=1e-7)


def test_top_edges_name_the_receiver_first_as_the_matrix_does() -> None:
    model = Layers()
    matrix = torch.eye(4)
    matrix[1, 3], matrix[2, 0], matrix[0, 1] = 0.5, 0.25, 0.125
    for _, graph in expert_graphs(model):
        graph.adjacency_EE.copy_(matrix)
        # Expert 1 receives from expert 3.
        assert float(graph(torch.eye(4))[3, 1]) == 0.5
    for found in graph_statistics(model, num_edges=2).values():
        assert found["top_edges"] == [(1, 3, 0.5), (2, 0, 0.25)]
    assert [len(found["top_edges"]) for found in graph_statistics(model, num_edges=9).values()] == [3, 3]  # type: ignore[arg-type]


def stacked(*shapes: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    return nn.ParameterList(torch.randn(shape) for shape in shapes)


def test_the_distance_of_experts_is_that_of_all_pairs() -> None:
    experts = stacked((5, 4, 3), (5, 7))
    flat_EP = torch.cat([part.detach().flatten(1) for part in experts.parameters()], 1).double()
    pairs = torch.pdist(flat_EP).square().mean()
    expected = (pairs / flat_EP.square().sum(1).mean()).sqrt()
    # Sums of 19 fp32 squares.
    assert expert_distance(experts) == pytest.approx(float(expected), rel=1e-5)


def test_copies_have_no_distance_and_unrelated_experts_that_of_a_right_angle() -> None:
    experts = stacked((6, 64, 64))
    assert expert_distance(experts) == pytest.approx(math.sqrt(2), rel=0.02)  # 4,096 random numbers each
    with torch.no_grad():
        for part in experts.parameters():
            part.copy_(part[:1].expand_as(part))
    assert expert_distance(experts) < 1e-6
    with torch.no_grad():
        next(experts.parameters())[0] += 1e-3 * torch.randn(64, 64)
    # One of six is a thousandth away, so five of fifteen pairs are.
    assert expert_distance(experts) == pytest.approx(1e-3 * math.sqrt(5 / 15), rel=0.05)


def test_a_single_expert_and_experts_of_zeros_have_no_distance() -> None:
    assert expert_distance(stacked((1, 4, 4))) == 0.0
    empty = stacked((3, 4))
    with torch.no_grad():
        next(empty.parameters()).zero_()
    assert expert_distance(empty) == 0.0
