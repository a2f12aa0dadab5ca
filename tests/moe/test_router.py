"""Routers against the formula written out in loops, and the properties that Symphony claims."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.layer import SparseMoE
from symphony_vlm.moe.router import Router

NUM_EXPERTS, HIDDEN, NUM_TOKENS = 5, 8, 23
COMPOSITIONS = list(itertools.product(["probs", "logits"], ["both", "selection", "weights"], ["softmax", "sigmoid"]))


def router_of(*, adjacency_EE: Tensor | None = None, seed: int = 0, **settings: Any) -> Router:
    config = MoEConfig(**({"num_experts": NUM_EXPERTS, "router": "symphony_smoe"} | settings))
    router = Router(config, HIDDEN, layer_name="decoder layer 7")
    router.reset(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        router.gate.weight *= 50  # clear preferences: N(0, 1) weights instead of N(0, 0.02)
        if adjacency_EE is not None and router.expert_graph is not None:
            router.expert_graph.adjacency_EE.copy_(adjacency_EE)
    return router.eval()


def identity_router(adjacency_EE: Tensor, **settings: Any) -> Router:
    """A router whose logits are its input, so that a test chooses them."""
    size = len(adjacency_EE)
    router = Router(MoEConfig(num_experts=size, router="symphony_smoe", **settings), size).eval()
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(size))
        assert router.expert_graph is not None
        router.expert_graph.adjacency_EE.copy_(adjacency_EE)
    return router


def layer_of(*, seed: int = 0, **settings: Any) -> SparseMoE:
    config = MoEConfig(**({"num_experts": NUM_EXPERTS} | settings))
    layer = SparseMoE(config, hidden_size=HIDDEN, intermediate_size=12, hidden_act="silu", layer_index=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer.reset(seed=seed, std=0.3)
    with torch.no_grad():
        layer.router.gate.weight *= 50
    return layer.eval()


def tokens(num_tokens: int = NUM_TOKENS, *, seed: int = 1, size: int = HIDDEN) -> Tensor:
    return torch.randn(num_tokens, size, generator=torch.Generator().manual_seed(seed))


def random_graph(seed: int = 2, size: int = NUM_EXPERTS) -> Tensor:
    """A row-stochastic matrix that is not symmetric."""
    return torch.rand(size, size, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def loop_router(config: MoEConfig, gate_ED: Tensor, adjacency_EE: Tensor, x_D: Tensor) -> tuple[list[int], list[float]]:
    """The specification for one token: gate, score, g_sym_j = sum_k a_jk g_k, K largest, divided by their sum."""

    def score(values: list[float]) -> list[float]:
        if config.score == "sigmoid":
            return [1 / (1 + math.exp(-v)) for v in values]
        total = sum(math.exp(v) for v in values)
        return [math.exp(v) / total for v in values]

    def smooth(values: list[float]) -> list[float]:
        return [sum(float(adjacency_EE[j, k]) * values[k] for k in range(len(values))) for j in range(len(values))]

    logits = [sum(float(w) * float(v) for w, v in zip(row, x_D, strict=True)) for row in gate_ED]
    plain = score(logits)
    smoothed = score(smooth(logits)) if config.smooth == "logits" else smooth(plain)
    select = plain if config.applies_to == "weights" else smoothed
    weigh = plain if config.applies_to == "selection" else smoothed
    chosen = sorted(range(len(select)), key=lambda e: (-select[e], e))[: config.num_experts_per_tok]
    weights = [weigh[e] for e in chosen]
    return chosen, [w / sum(weights) for w in weights] if config.renormalize else weights


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("num_experts_per_tok", [2, 3])
@pytest.mark.parametrize(("smooth", "applies_to", "score"), COMPOSITIONS)
def test_a_router_equals_the_formula_in_loops(
    smooth: str, applies_to: str, score: str, num_experts_per_tok: int, renormalize: bool
) -> None:
    router = router_of(
        adjacency_EE=random_graph(),
        smooth=smooth,
        applies_to=applies_to,
        score=score,
        num_experts_per_tok=num_experts_per_tok,
        renormalize=renormalize,
    )
    x_TD = tokens()
    out = router(x_TD)
    assert router.expert_graph is not None
    for t, x_D in enumerate(x_TD):
        chosen, weights = loop_router(router.config, router.gate.weight.detach(), router.expert_graph.adjacency_EE, x_D)
        assert out.indices_TK[t].tolist() == chosen
        # Logits up to 10 in fp32 carry errors of about 1e-6, and so do the relative errors of their exponentials.
        assert out.weights_TK[t].tolist() == pytest.approx(weights, rel=1e-5)


@pytest.mark.parametrize(("smooth", "applies_to", "score"), COMPOSITIONS)
def test_with_the_identity_as_graph_symphony_is_the_plain_router_bit_for_bit(
    smooth: str, applies_to: str, score: str
) -> None:
    """A product with the identity adds zeros only, so no tolerance is due, in outputs or gradients."""
    results = []
    for name in ("smoe", "symphony_smoe"):
        layer = layer_of(router=name, smooth=smooth, applies_to=applies_to, score=score)
        x_TD = tokens().requires_grad_()
        y_BSD = layer(x_TD[None])
        y_BSD.square().sum().backward()
        results.append([y_BSD, x_TD.grad, *(p.grad for p in layer.parameters())])
    for plain, symphony in zip(*results, strict=True):
        assert torch.equal(plain, symphony)
        assert plain.abs().sum() > 0


@pytest.mark.parametrize(("smooth", "applies_to", "score"), COMPOSITIONS)
def test_a_graph_other_than_the_identity_changes_what_it_applies_to(smooth: str, applies_to: str, score: str) -> None:
    x_TD = tokens(200)
    plain = router_of(router="smoe", score=score)(x_TD)
    # A strong graph: sets really change.
    graph_EE = torch.roll(torch.eye(NUM_EXPERTS), 1, 0) * 0.6 + 0.4 * torch.eye(NUM_EXPERTS)
    out = router_of(adjacency_EE=graph_EE, smooth=smooth, applies_to=applies_to, score=score)(x_TD)
    same_sets = torch.equal(out.indices_TK, plain.indices_TK)
    assert same_sets is (applies_to == "weights")
    plain_all_TE = plain.scores_TE
    unsmoothed_TK = plain_all_TE.gather(-1, out.indices_TK)
    unsmoothed_TK = unsmoothed_TK / unsmoothed_TK.sum(-1, keepdim=True)
    assert torch.equal(out.weights_TK, unsmoothed_TK) is (applies_to == "selection")


@pytest.mark.parametrize(("smooth", "applies_to", "score"), COMPOSITIONS)
def test_relabelling_the_experts_leaves_the_layer_unchanged(smooth: str, applies_to: str, score: str) -> None:
    """With a permutation P of the experts, A becomes P A P^T."""
    layer = layer_of(router="symphony_smoe", smooth=smooth, applies_to=applies_to, score=score)
    relabelled = layer_of(router="symphony_smoe", smooth=smooth, applies_to=applies_to, score=score)
    order_E = torch.tensor([3, 0, 4, 1, 2])
    assert layer.router.expert_graph is not None and relabelled.router.expert_graph is not None
    with torch.no_grad():
        layer.router.expert_graph.adjacency_EE.copy_(random_graph())
        relabelled.router.expert_graph.adjacency_EE.copy_(random_graph()[order_E][:, order_E])
        relabelled.router.gate.weight.copy_(layer.router.gate.weight[order_E])
        relabelled.experts.gate_up_proj.copy_(layer.experts.gate_up_proj[order_E])
        relabelled.experts.down_proj.copy_(layer.experts.down_proj[order_E])
    x_BSD = tokens()[None]
    # The K outputs of a token are added in another order: one rounding of fp32 sums of size about 10.
    torch.testing.assert_close(layer(x_BSD), relabelled(x_BSD), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("router", ["smoe", "symphony_smoe"])
def test_ties_go_to_the_lower_index(router: str) -> None:
    tied = router_of(router=router, num_experts_per_tok=3)
    with torch.no_grad():
        tied.gate.weight.zero_()
    out = tied(tokens())
    assert out.indices_TK.tolist() == [[0, 1, 2]] * NUM_TOKENS
    torch.testing.assert_close(out.weights_TK, torch.full((NUM_TOKENS, 3), 1 / 3))


@pytest.mark.parametrize(("active", "training"), itertools.product(["always", "train", "eval"], [True, False]))
def test_the_graph_acts_only_in_the_mode_it_is_active_in(active: str, training: bool) -> None:
    x_TD = tokens()
    out = router_of(adjacency_EE=random_graph(), active=active).train(training)(x_TD)
    plain = router_of(router="smoe")(x_TD)
    acts = active == "always" or (active == "train") is training
    assert torch.equal(out.scores_TE, plain.scores_TE) is not acts
    # Losses see the gate before the graph in every mode.
    assert torch.equal(out.logits_TE, plain.logits_TE)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_is_an_error_naming_the_layer(bad: float) -> None:
    x_TD = tokens()
    x_TD[3, 0] = bad
    with pytest.raises(RuntimeError, match=r"decoder layer 7.*not finite.*learning rate"):
        router_of()(x_TD)


def test_no_token_at_all_is_routed_to_nobody() -> None:
    out = router_of()(torch.empty(0, HIDDEN))
    assert out.indices_TK.shape == (0, 2) and out.weights_TK.shape == (0, 2)


def test_a_single_expert_gets_everything_with_weight_one() -> None:
    router = router_of(num_experts=1, num_experts_per_tok=1, counts="soft")
    out = router(tokens())
    assert not out.indices_TK.any()
    assert torch.equal(out.weights_TK, torch.ones(NUM_TOKENS, 1))
    assert torch.equal(router.membership(out, None), torch.ones(NUM_TOKENS, 1))


def test_the_gate_computes_in_fp32_whatever_surrounds_it() -> None:
    router = router_of()
    x_TD = tokens().bfloat16()
    reference_TE = x_TD.float() @ router.gate.weight.T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside_TE = router(x_TD).logits_TE
    for logits_TE in (inside_TE, router.bfloat16()(x_TD).logits_TE):
        assert logits_TE.dtype == torch.float32
        assert torch.equal(logits_TE, reference_TE)


def test_a_cast_router_still_trains_the_same_parameter() -> None:
    router = router_of()
    optimizer = torch.optim.SGD(router.parameters(), lr=0.1)
    router.bfloat16()
    router(tokens()).weights_TK[:, 0].sum().backward()
    before = router.gate.weight.detach().clone()
    optimizer.step()
    assert router.gate.weight.dtype == torch.float32
    assert not torch.equal(before, router.gate.weight)


def test_jitter_moves_the_input_within_its_width_and_only_in_training() -> None:
    noise = 0.1
    router = identity_router(torch.eye(4), jitter_noise=noise)
    x_TD = torch.ones(500, 4)
    assert torch.equal(router(x_TD).logits_TE, x_TD)
    jittered_TE = router.train()(x_TD).logits_TE
    assert jittered_TE.min() >= 1 - noise and jittered_TE.max() <= 1 + noise
    # The standard deviation of a uniform variable is its width / sqrt(12); 2000 draws give it to about 1.5 %.
    assert jittered_TE.std().item() == pytest.approx(2 * noise / math.sqrt(12), rel=0.08)


def test_hard_membership_is_the_one_hot_of_the_selected_set_without_padding() -> None:
    router = router_of()
    out = router(tokens())
    mask_T = torch.arange(NUM_TOKENS) % 3 != 0
    membership_TE = router.membership(out, mask_T)
    for t in range(NUM_TOKENS):
        chosen = set(out.indices_TK[t].tolist()) if mask_T[t] else set()
        assert membership_TE[t].tolist() == [float(e in chosen) for e in range(NUM_EXPERTS)]


@pytest.mark.parametrize(("num_experts_per_tok", "counted"), [(1, 2), (2, 2), (3, 3)])
def test_soft_membership_is_the_weights_of_at_least_the_top_two(num_experts_per_tok: int, counted: int) -> None:
    router = router_of(num_experts_per_tok=num_experts_per_tok, counts="soft", adjacency_EE=random_graph())
    out = router(tokens())
    membership_TE = router.membership(out, None)
    assert ((membership_TE > 0).sum(-1) == counted).all()
    torch.testing.assert_close(membership_TE.sum(-1), torch.ones(NUM_TOKENS))
    for row, scores in zip(membership_TE, out.scores_TE, strict=True):
        best = scores.argsort(descending=True)[:counted]
        torch.testing.assert_close(row[best], scores[best] / scores[best].sum())


# Additive noise on the logits (smooth: logits): what a graph does to it in closed form.

SIGMA = 0.7
DRAWS = 40_000
LOGITS = torch.tensor([1.0, 0.9, 0.2, 0.1])
COMMUNITIES = torch.block_diag(torch.full((2, 2), 0.5), torch.full((2, 2), 0.5))


def noisy_scores(adjacency_EE: Tensor, seed: int = 0) -> Tensor:
    noise_TE = SIGMA * tokens(DRAWS, seed=seed, size=len(adjacency_EE))
    scores_TE: Tensor = identity_router(adjacency_EE, smooth="logits")(LOGITS + noise_TE).scores_TE
    return scores_TE


def error_rate(adjacency_EE: Tensor, better: int, worse: int) -> float:
    """Share of noisy tokens for which the graph ranks `worse` above `better`."""
    scores_TE = noisy_scores(adjacency_EE)
    return float((scores_TE[:, better] < scores_TE[:, worse]).float().mean())


def expected_error_rate(adjacency_EE: Tensor, better: int, worse: int) -> float:
    """Q((a_i - a_j)^T z / (s ||a_i - a_j||)), Q the upper tail of the standard normal distribution."""
    direction_E = adjacency_EE[better] - adjacency_EE[worse]
    return 0.5 * math.erfc(float(direction_E @ LOGITS / (SIGMA * direction_E.norm())) / math.sqrt(2))


@pytest.mark.parametrize("graph_EE", [torch.eye(4), COMMUNITIES, random_graph(size=4)], ids=["I", "blocks", "random"])
def test_noise_is_damped_by_the_norm_of_the_graphs_rows(graph_EE: Tensor) -> None:
    router = identity_router(graph_EE, smooth="logits")
    assert router.expert_graph is not None
    noise_TE = SIGMA * tokens(DRAWS, size=4)
    variance_E = router.expert_graph(noise_TE).var(0)
    # A sample variance of N draws has a relative standard error of sqrt(2 / N) = 0.7 %; 3 % is four of them.
    torch.testing.assert_close(variance_E, SIGMA**2 * graph_EE.square().sum(1), rtol=0.03, atol=0)
    assert (graph_EE.square().sum(1) <= 1 + 1e-6).all()


@pytest.mark.parametrize(("better", "worse"), [(0, 2), (1, 2), (0, 3), (0, 1)])
@pytest.mark.parametrize(
    "graph_EE",
    [torch.eye(4), 0.5 * torch.eye(4) + 0.5 * COMMUNITIES, random_graph(size=4)],
    ids=["I", "half", "random"],
)
def test_the_probability_of_a_flip_is_the_closed_form(graph_EE: Tensor, better: int, worse: int) -> None:
    expected = expected_error_rate(graph_EE, better, worse)
    # A proportion of N draws: standard error at most 0.5 / sqrt(N) = 0.25 %; four of them.
    assert error_rate(graph_EE, better, worse) == pytest.approx(expected, abs=0.01)


def test_a_graph_that_knows_the_communities_makes_fewer_errors_between_them() -> None:
    # Closed forms: Q(0.7 / (0.7 sqrt 2)) = 0.24 for the plain router, Q(0.8 / 0.7) = 0.13 for the averaged pairs.
    assert error_rate(COMMUNITIES, 1, 2) < error_rate(torch.eye(4), 1, 2) - 0.05


def test_the_uniform_graph_knows_nothing_any_more() -> None:
    scores_TE = noisy_scores(torch.full((4, 4), 0.25))
    # All scores are 1 / 4 but for the rounding of a sum of four.
    torch.testing.assert_close(scores_TE, torch.full_like(scores_TE, 0.25), atol=1e-6, rtol=0)


def test_random_graphs_do_not_help_on_average() -> None:
    plain = expected_error_rate(torch.eye(4), 1, 2)
    rates = [error_rate(random_graph(seed, size=4), 1, 2) for seed in range(20)]
    assert sum(rates) / len(rates) > plain
