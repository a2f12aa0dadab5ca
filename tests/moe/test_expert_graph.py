"""The expert graph by itself: its target matrix, its moving average, its precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from symphony_vlm.errors import InputError
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import (
    ControlGraph,
    ExpertGraph,
    LearnableGraph,
    StoredGraph,
    SymphonyGraph,
    expert_graphs,
    make_expert_graph,
    normalize_counts,
    set_expert_graph_,
    update_expert_graphs,
)
from symphony_vlm.moe.layer import SparseMoE

NUM_EXPERTS = 5
NUM_TOKENS = 40
NORMALIZATIONS = ["row", "symmetric", "sinkhorn", "frequency"]
CONTROLS = ["uniform", "random", "shuffled"]


def config_of(**settings: Any) -> MoEConfig:
    return MoEConfig(**({"num_experts": NUM_EXPERTS, "router": "symphony_smoe"} | settings))


def membership(num_tokens: int = NUM_TOKENS, *, among: int = NUM_EXPERTS, seed: int = 0) -> Tensor:
    """One-hot sets of two experts per token, out of the first `among`."""
    generator = torch.Generator().manual_seed(seed)
    # Unequal odds, so that row sums differ and the normalisations can be told apart.
    odds = torch.arange(1.0, among + 1).expand(num_tokens, among)
    sets = torch.multinomial(odds, 2, generator=generator)
    return torch.zeros(num_tokens, NUM_EXPERTS).scatter_(1, sets, 1.0)


def counts_of(membership_TE: Tensor) -> Tensor:
    return membership_TE.T @ membership_TE


def flat(membership_TE: Tensor) -> Tensor:
    """Counts in the layout of `take_counts`."""
    return torch.cat([counts_of(membership_TE).flatten(), torch.tensor([float(len(membership_TE))])])


def numpy_target(counts: np.ndarray, num_tokens: int, *, normalization: str, diagonal: str, strength: float) -> Any:
    """The specification, written out entry by entry in float64."""
    size = len(counts)
    counts = counts.astype(np.float64)
    if diagonal == "drop":
        counts = counts - np.diag(np.diag(counts))
    degree = counts.sum(1)
    alone = degree == 0
    norm = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            if normalization == "row" and not alone[i]:
                norm[i, j] = counts[i, j] / degree[i]
            if normalization == "symmetric" and not alone[i] and not alone[j]:
                norm[i, j] = counts[i, j] / np.sqrt(degree[i] * degree[j])
            if normalization == "frequency":
                norm[i, j] = counts[i, j] / num_tokens
    if normalization == "sinkhorn":
        norm = counts + np.diag(alone.astype(float))
        for _ in range(2000):
            norm = norm / norm.sum(0, keepdims=True)
            norm = norm / norm.sum(1, keepdims=True)
    norm[alone] = np.eye(size)[alone]
    return (1 - strength) * np.eye(size) + strength * norm


# fp32 divisions and square roots: a few units of 6e-8 relative on entries of at most about 2. Sinkhorn converges
# geometrically; on these counts 50 rounds leave less than 1e-5 (2000 rounds in float64 are the reference).
@pytest.mark.parametrize(
    ("normalization", "tolerance"), [("row", 1e-6), ("symmetric", 1e-6), ("frequency", 1e-6), ("sinkhorn", 2e-5)]
)
@pytest.mark.parametrize("diagonal", ["drop", "keep"])
@pytest.mark.parametrize("among", [NUM_EXPERTS, NUM_EXPERTS - 1])
def test_the_target_matrix_equals_the_formula(normalization: str, tolerance: float, diagonal: str, among: int) -> None:
    config = config_of(normalization=normalization, diagonal=diagonal, strength=0.3)
    counts_EE = counts_of(membership(among=among))
    ours = normalize_counts(counts_EE, torch.tensor(float(NUM_TOKENS)), config)
    reference = numpy_target(
        counts_EE.numpy(), NUM_TOKENS, normalization=normalization, diagonal=diagonal, strength=0.3
    )
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), reference, atol=tolerance, rtol=0)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_an_expert_never_selected_keeps_its_identity_row(normalization: str) -> None:
    target_EE = normalize_counts(
        counts_of(membership(among=NUM_EXPERTS - 1)),
        torch.tensor(float(NUM_TOKENS)),
        config_of(normalization=normalization),
    )
    torch.testing.assert_close(target_EE[-1], torch.eye(NUM_EXPERTS)[-1], atol=0, rtol=0)
    torch.testing.assert_close(target_EE[:, -1], torch.eye(NUM_EXPERTS)[:, -1], atol=0, rtol=0)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_strength_zero_is_the_identity(normalization: str) -> None:
    config = config_of(normalization=normalization, strength=0.0)
    target_EE = normalize_counts(counts_of(membership()), torch.tensor(float(NUM_TOKENS)), config)
    assert torch.equal(target_EE, torch.eye(NUM_EXPERTS))


@pytest.mark.parametrize("normalization", ["row", "sinkhorn"])
def test_rows_sum_to_one_where_the_normalisation_promises_it(normalization: str) -> None:
    config = config_of(normalization=normalization)
    target_EE = normalize_counts(counts_of(membership(among=3)), torch.tensor(float(NUM_TOKENS)), config)
    # Five fp32 additions of numbers below 1.
    torch.testing.assert_close(target_EE.sum(1), torch.ones(NUM_EXPERTS), atol=1e-6, rtol=0)


@pytest.mark.parametrize("normalization", ["symmetric", "frequency"])
def test_symmetric_counts_stay_symmetric_where_the_normalisation_promises_it(normalization: str) -> None:
    target_EE = normalize_counts(
        counts_of(membership()), torch.tensor(float(NUM_TOKENS)), config_of(normalization=normalization)
    )
    torch.testing.assert_close(target_EE, target_EE.T, atol=1e-7, rtol=0)


def test_dropping_the_diagonal_forgets_how_often_an_expert_was_chosen_at_all() -> None:
    counts_EE = counts_of(membership())
    busier_EE = counts_EE + torch.diag(torch.arange(NUM_EXPERTS).float())
    tokens = torch.tensor(float(NUM_TOKENS))
    drop, keep = config_of(diagonal="drop"), config_of(diagonal="keep")
    assert torch.equal(normalize_counts(counts_EE, tokens, drop), normalize_counts(busier_EE, tokens, drop))
    assert not torch.equal(normalize_counts(counts_EE, tokens, keep), normalize_counts(busier_EE, tokens, keep))


def test_one_update_is_the_moving_average_of_the_formula() -> None:
    config = config_of(momentum=0.9)
    graph = SymphonyGraph(config)
    expected_EE = torch.eye(NUM_EXPERTS)
    for step in range(3):
        membership_TE = membership(seed=step)
        graph.update(flat(membership_TE))
        target_EE = normalize_counts(counts_of(membership_TE), torch.tensor(float(NUM_TOKENS)), config)
        expected_EE = 0.9 * expected_EE + 0.1 * target_EE
    # Three rounds of two fp32 products; 0.9 as fp32 tensor against Python's double costs up to 6e-8 each.
    torch.testing.assert_close(graph.adjacency_EE, expected_EE, atol=1e-6, rtol=0)
    assert int(graph.num_updates) == 3


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_layers_that_move_together_move_as_each_would_alone(normalization: str) -> None:
    """Several kinds and sizes in one model, one layer without a token."""
    configs = [config_of(normalization=normalization, expert_graph=kind) for kind in ["symphony", *CONTROLS]]
    configs += [config_of(normalization=normalization, momentum=0.5)]
    pairs = [(make_expert_graph(config), make_expert_graph(config)) for config in configs for _ in range(3)]
    model = nn.ModuleList([together for together, _ in pairs])
    for number, (together, alone) in enumerate(pairs):
        assert isinstance(together, SymphonyGraph) and isinstance(alone, SymphonyGraph)
        if number != 1:
            together.count(membership(seed=number))
            alone.count(membership(seed=number))
        alone.update(alone.take_counts())
    update_expert_graphs(model)
    for number, (together, alone) in enumerate(pairs):
        assert together is not None and alone is not None
        assert torch.equal(together.adjacency_EE, alone.adjacency_EE)
        assert int(together.num_updates) == int(alone.num_updates) == int(number != 1)


def test_more_layers_of_one_kind_do_not_take_more_steps_to_move() -> None:
    """On an accelerator every operation is a launch. Only taking a layer's counts is done layer by layer."""

    def num_operations(num_layers: int) -> int:
        graphs = nn.ModuleList([SymphonyGraph(config_of()) for _ in range(num_layers)])
        for graph in graphs:
            graph.count(membership())
        with _Operations() as found:
            update_expert_graphs(graphs)
        return found.number

    taking = 2  # ``cat``, and the token count as a float; views start nothing
    assert num_operations(9) - num_operations(3) <= 6 * taking


def test_a_graph_adds_one_operation_to_a_layer_each_way() -> None:
    """The product of gates and graph; what is counted is there anyway, for the balance loss."""

    def num_operations(router: str) -> tuple[int, int]:
        layer = SparseMoE(
            config_of(router=router), hidden_size=16, intermediate_size=16, hidden_act="silu", layer_index=0
        )
        layer.reset(std=0.2)
        x_BSD = torch.randn(2, NUM_TOKENS, 16)
        layer(x_BSD).sum().backward()  # gradients exist from here on, in both
        with _Operations() as forward:
            y_BSD = layer(x_BSD)
        with _Operations() as backward:
            y_BSD.sum().backward()
        return forward.number, backward.number

    forward, backward = num_operations("smoe")
    assert num_operations("symphony_smoe") == (forward + 1, backward + 1)


class _Operations(TorchDispatchMode):
    """Counts operations that start work: not those that only look at memory otherwise."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


def test_constant_counts_are_approached_geometrically() -> None:
    """E[A_t] - C = m^t (A_0 - C): with constant counts the expectation is the value itself."""
    config = config_of(momentum=0.8)
    graph = SymphonyGraph(config)
    membership_TE = membership()
    target_EE = normalize_counts(counts_of(membership_TE), torch.tensor(float(NUM_TOKENS)), config)
    for _ in range(12):
        graph.update(flat(membership_TE))
    expected_EE = target_EE + 0.8**12 * (torch.eye(NUM_EXPERTS) - target_EE)
    torch.testing.assert_close(graph.adjacency_EE, expected_EE, atol=2e-6, rtol=0)


def test_the_mean_and_the_stationary_variance_are_those_of_a_moving_average() -> None:
    """For i.i.d. counts: mean of A = mean of the targets, Var(A) = (1 - m) / (1 + m) Var(target)."""
    momentum, steps, burn_in = 0.8, 4000, 50
    config = config_of(momentum=momentum)
    graph = SymphonyGraph(config)
    tokens = torch.tensor(8.0)
    states, targets = [], []
    for step in range(steps):
        membership_TE = membership(8, seed=step)
        graph.update(flat(membership_TE))
        targets.append(normalize_counts(counts_of(membership_TE), tokens, config))
        states.append(graph.adjacency_EE.clone())
    states_NEE, targets_NEE = torch.stack(states[burn_in:]), torch.stack(targets[burn_in:])
    # The averages differ only by edge effects: at most (1 / (1 - m)) / N of the range, 5 / 3950 of 1.
    torch.testing.assert_close(states_NEE.mean(0), targets_NEE.mean(0), atol=2e-3, rtol=0)
    ratio = float(states_NEE.var(0).sum() / targets_NEE.var(0).sum())
    # The states' autocorrelation time is (1 + m) / (1 - m) = 9 steps, so about 440 independent draws of each of some
    # ten independent entries: a relative standard error of about sqrt(2 / 4400) = 2 %; 8 % is four of them.
    assert ratio == pytest.approx((1 - momentum) / (1 + momentum), rel=0.08)


def test_smoothing_follows_the_formula_entry_by_entry() -> None:
    graph = SymphonyGraph(config_of(momentum=0.0))
    graph.update(flat(membership()))
    values_TE = torch.randn(4, NUM_EXPERTS, generator=torch.Generator().manual_seed(1))
    adjacency_EE = graph.adjacency_EE
    expected = [
        [sum(float(adjacency_EE[j, k] * row[k]) for k in range(NUM_EXPERTS)) for j in range(NUM_EXPERTS)]
        for row in values_TE
    ]
    # Not symmetric with row normalisation, so a transposed product would be seen.
    assert not torch.allclose(adjacency_EE, adjacency_EE.T)
    torch.testing.assert_close(graph(values_TE), torch.tensor(expected), atol=1e-6, rtol=0)


def test_counts_add_up_over_forwards_and_are_taken_once() -> None:
    graph = SymphonyGraph(config_of())
    first_TE, second_TE = membership(seed=1), membership(seed=2)
    graph.count(first_TE)
    graph.count(second_TE)
    assert torch.equal(graph.take_counts(), flat(torch.cat([first_TE, second_TE])))
    assert not graph.take_counts().any()


def test_counting_does_not_change_the_tensor_that_was_counted() -> None:
    graph = SymphonyGraph(config_of())
    membership_TE = membership()
    before = membership_TE.clone()
    graph.count(membership_TE)
    graph.count(membership_TE)
    assert torch.equal(membership_TE, before)


def test_rows_of_padding_are_neither_counted_nor_tokens() -> None:
    graph = SymphonyGraph(config_of())
    membership_TE = membership()
    graph.count(torch.cat([membership_TE, torch.zeros(7, NUM_EXPERTS)]))
    assert torch.equal(graph.take_counts(), flat(membership_TE))


def test_a_step_without_any_token_changes_nothing() -> None:
    graph = SymphonyGraph(config_of())
    graph.update(flat(membership()))
    before = graph.adjacency_EE.clone()
    graph.update(graph.take_counts())
    assert torch.equal(graph.adjacency_EE, before)
    assert int(graph.num_updates) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_model_leaves_the_graph_in_fp32_with_all_its_bits(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(2, 2), SymphonyGraph(config_of(momentum=0.99)))
    graph = model[1]
    graph.update(flat(membership()))
    before = graph.adjacency_EE.clone()
    casts = {torch.bfloat16: model.bfloat16, torch.float16: model.half, torch.float64: model.double}
    for cast in (casts[dtype], lambda: model.to(dtype)):
        cast()
        assert model[0].weight.dtype == dtype
        assert graph.adjacency_EE.dtype == torch.float32
        assert torch.equal(graph.adjacency_EE, before)
    # The buffer must still be the registered one, or it would be missing from checkpoints.
    assert torch.equal(model.state_dict()["1.adjacency_EE"], before)


def test_a_half_precision_graph_would_not_move() -> None:
    """Why fp32: a step of (1 - 0.99) times a small difference is below half of a bfloat16 unit at 1."""
    graph = SymphonyGraph(config_of(momentum=0.999, strength=0.1))
    graph.update(flat(membership()))
    moved = (graph.adjacency_EE - torch.eye(NUM_EXPERTS)).abs().diagonal()
    assert (moved > 0).all()
    assert torch.equal(graph.adjacency_EE.bfloat16().diagonal(), torch.ones(NUM_EXPERTS, dtype=torch.bfloat16))


def test_state_and_scratch_are_told_apart_in_checkpoints() -> None:
    graph = SymphonyGraph(config_of())
    graph.count(membership())
    assert set(graph.state_dict()) == {"adjacency_EE", "num_updates"}


def test_updating_a_model_updates_every_graph_once_and_a_model_without_graphs_is_fine() -> None:
    model = nn.ModuleDict({"a": SymphonyGraph(config_of()), "b": nn.ModuleList([SymphonyGraph(config_of())])})
    graphs = dict(expert_graphs(model))
    assert list(graphs) == ["a", "b.0"]
    graphs["b.0"].count(membership())
    update_expert_graphs(model)
    assert [int(graph.num_updates) for graph in graphs.values()] == [0, 1]
    update_expert_graphs(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("active", "in_training", "in_evaluation"),
    [
        ("always", True, True),
        ("train", True, False),
        ("eval", False, True),
    ],
)
def test_active_says_in_which_mode_the_graph_takes_part(active: str, in_training: bool, in_evaluation: bool) -> None:
    graph = SymphonyGraph(config_of(active=active))
    assert graph.train().is_active is in_training
    assert graph.eval().is_active is in_evaluation


def random_rows(size: int = NUM_EXPERTS, seed: int = 0) -> Tensor:
    rows = torch.rand(size, size, generator=torch.Generator().manual_seed(seed))
    return rows / rows.sum(1, keepdim=True)


def graph_of(kind: str, **settings: Any) -> ExpertGraph:
    graph = make_expert_graph(config_of(expert_graph=kind, **settings))
    assert graph is not None
    graph.reset()
    return graph


def test_a_composition_names_its_kind_of_graph() -> None:
    kinds: dict[str, type[ExpertGraph]] = {"symphony": SymphonyGraph, "learnable": LearnableGraph, "fixed": StoredGraph}
    kinds |= dict.fromkeys(CONTROLS, ControlGraph)
    assert {kind: type(graph_of(kind)) for kind in kinds} == kinds
    assert make_expert_graph(config_of(expert_graph="none")) is None


@pytest.mark.parametrize("num_experts", [2, 5, 64])
def test_a_learnable_graph_starts_near_the_identity(num_experts: int) -> None:
    adjacency_EE = graph_of("learnable", num_experts=num_experts).adjacency_EE
    expected_EE = torch.full((num_experts, num_experts), 0.1 / (num_experts - 1)).fill_diagonal_(0.9)
    # An fp32 logarithm and its exponential.
    torch.testing.assert_close(adjacency_EE, expected_EE, atol=0, rtol=1e-5)


def test_a_single_experts_learnable_graph_is_one() -> None:
    graph = graph_of("learnable", num_experts=1, num_experts_per_tok=1)
    assert torch.equal(graph.adjacency_EE, torch.ones(1, 1))


def test_a_learnable_graph_is_the_row_softmax_of_its_matrix_and_descends_to_a_target() -> None:
    """The graph alone can turn gate values into their permutation, so gradient must find that matrix."""
    graph = graph_of("learnable")
    values_TE = torch.rand(200, NUM_EXPERTS, generator=torch.Generator().manual_seed(0)).softmax(-1)
    target_EE = torch.eye(NUM_EXPERTS).roll(1, 0)
    optimizer = torch.optim.Adam(graph.parameters(), lr=0.1)
    for _ in range(300):
        loss = (graph(values_TE) - values_TE @ target_EE.T).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert isinstance(graph, LearnableGraph)
    torch.testing.assert_close(graph.adjacency_EE, graph.logits_EE.softmax(-1), atol=0, rtol=0)
    # A softmax reaches a one-hot row only in the limit; three quarters of the way cannot be chance.
    assert (graph.adjacency_EE * target_EE).sum(1).min() > 0.75


@pytest.mark.parametrize("kind", ["learnable", "fixed"])
def test_updates_leave_a_graph_that_is_not_counted_alone(kind: str) -> None:
    model = nn.ModuleList([graph_of(kind), graph_of("symphony")])
    before_EE = model[0].adjacency_EE.detach().clone()
    model[1].count(membership())
    update_expert_graphs(model)
    assert torch.equal(model[0].adjacency_EE, before_EE) and int(model[0].num_updates) == 0
    assert int(model[1].num_updates) == 1


def test_a_learnable_graph_keeps_fp32_and_what_a_checkpoint_provided() -> None:
    graph = graph_of("learnable")
    assert isinstance(graph, LearnableGraph)
    graph.logits_EE.data.normal_()
    before_EE = graph.logits_EE.detach().clone()
    graph.bfloat16()
    graph.logits_EE._is_hf_initialized = True  # type: ignore[attr-defined]
    graph.reset()
    assert graph.logits_EE.dtype == torch.float32 and torch.equal(graph.logits_EE, before_EE)


def test_a_fixed_graph_is_the_identity_until_it_is_set_and_is_saved() -> None:
    model = nn.ModuleList([graph_of("fixed"), graph_of("fixed")])
    assert torch.equal(model[1].adjacency_EE, torch.eye(NUM_EXPERTS))
    adjacency_EE = random_rows()
    set_expert_graph_(model, adjacency_EE)
    loaded = nn.ModuleList([graph_of("fixed"), graph_of("fixed")])
    loaded.load_state_dict(model.state_dict())
    for graph in (*model, *loaded):
        assert torch.equal(graph.adjacency_EE, adjacency_EE)
        assert graph.adjacency_EE is not adjacency_EE
    assert not list(model.parameters())


@pytest.mark.parametrize("kind", ["symphony", "learnable", "none"])
def test_a_graph_that_would_move_cannot_be_set(kind: str) -> None:
    model = nn.Identity() if kind == "none" else graph_of(kind)
    with pytest.raises(InputError, match="expert_graph: fixed"):
        set_expert_graph_(model, torch.eye(NUM_EXPERTS))


@pytest.mark.parametrize(
    "matrix", [torch.eye(NUM_EXPERTS + 1), torch.ones(NUM_EXPERTS), torch.full((NUM_EXPERTS, NUM_EXPERTS), torch.nan)]
)
def test_a_matrix_that_does_not_fit_is_refused_with_its_shape(matrix: Tensor) -> None:
    with pytest.raises(InputError, match=r"5 x 5 finite numbers") as error:
        set_expert_graph_(graph_of("fixed"), matrix)
    assert str(tuple(matrix.shape)) in str(error.value)


def controlled(kind: str, counts_EE: Tensor, **settings: Any) -> Tensor:
    """The graph of a control after one step that forgets the identity."""
    graph = graph_of(kind, num_experts=len(counts_EE), momentum=0.0, **settings)
    assert isinstance(graph, ControlGraph)
    graph.update(torch.cat([counts_EE.flatten(), torch.tensor([float(NUM_TOKENS)])]))
    return graph.adjacency_EE


def off_diagonal(matrix_EE: Tensor) -> Tensor:
    return matrix_EE[~torch.eye(len(matrix_EE), dtype=torch.bool)]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_shuffled_graph_is_symphonys_between_other_experts(normalization: str) -> None:
    counts_EE = counts_of(membership())
    own_EE = normalize_counts(counts_EE, torch.tensor(float(NUM_TOKENS)), config_of(normalization=normalization))
    shuffled_EE = controlled("shuffled", counts_EE, normalization=normalization)
    # Sinkhorn's sums are formed in another order.
    torch.testing.assert_close(shuffled_EE, own_EE.roll((1, 1), (0, 1)), atol=1e-6, rtol=0)
    assert (shuffled_EE - own_EE).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["uniform", "random"])
def test_other_controls_know_the_totals_of_the_counts_alone(kind: str) -> None:
    one_EE, other_EE = counts_of(membership(seed=1)), counts_of(membership(seed=2))
    assert not torch.equal(one_EE, other_EE)
    for settings in ({}, {"normalization": "frequency", "diagonal": "keep"}):
        first_EE, second_EE = (controlled(kind, counts_EE, **settings) for counts_EE in (one_EE, other_EE))
        # Equal totals, 40 tokens of two experts each; a division of fp32 apart.
        torch.testing.assert_close(first_EE, second_EE, atol=1e-6, rtol=0)
    # strength (1 / tokens) sum C, off the diagonal: two ordered pairs a token.
    frequency_EE = controlled(kind, one_EE, normalization="frequency")
    torch.testing.assert_close(off_diagonal(frequency_EE).sum(), torch.tensor(0.5 * 2.0), atol=1e-5, rtol=0)


def test_a_uniform_control_is_even_and_a_random_one_is_not() -> None:
    counts_EE = counts_of(membership())
    even_EE, random_EE = controlled("uniform", counts_EE), controlled("random", counts_EE)
    torch.testing.assert_close(off_diagonal(even_EE), torch.full((20,), 0.5 / 4), atol=1e-6, rtol=0)
    for matrix_EE in (even_EE, random_EE):
        torch.testing.assert_close(matrix_EE.sum(1), torch.ones(5), atol=1e-6, rtol=0)
        torch.testing.assert_close(matrix_EE.diagonal(), torch.full((5,), 0.5), atol=1e-6, rtol=0)
    assert off_diagonal(random_EE).max() > 3 * off_diagonal(random_EE).min()


@pytest.mark.parametrize("kind", CONTROLS)
def test_a_control_without_counts_stays_and_needs_some(kind: str) -> None:
    graph = graph_of(kind)
    update_expert_graphs(nn.ModuleList([graph]))
    assert torch.equal(graph.adjacency_EE, torch.eye(NUM_EXPERTS)) and int(graph.num_updates) == 0
    with pytest.raises(InputError, match="counts: soft"):
        config_of(expert_graph=kind, num_experts_per_tok=1)
