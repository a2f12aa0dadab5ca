"""Routers against the formula written out in loops, and what must hold at their edges. Proofs: `test_proofs.py`."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.router import Router

NUM_EXPERTS, HIDDEN, NUM_TOKENS = 5, 8, 23
COMPOSITIONS = list(itertools.product(["probs", "logits"], ["both", "selection", "weights"], ["softmax", "sigmoid"]))


def router_of(*, adjacency_EE: Tensor | None = None, seed: int = 0, **settings: Any) -> Router:
    config = MoEConfig(**({"num_experts": NUM_EXPERTS, "router": "symphony_smoe"} | settings))
    router = Router(config, HIDDEN, layer_name="decoder layer 7")
    router.reset(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in router.gate.parameters():
            parameter *= 50  # clear preferences: N(0, 1) weights instead of N(0, 0.02)
        if adjacency_EE is not None and router.config.expert_graph == "symphony":
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


@pytest.mark.parametrize("smooth", ["probs", "logits"])
@pytest.mark.parametrize("gate", ["linear", "cosine"])
@pytest.mark.parametrize("expert_graph", ["none", "symphony", "learnable"])
def test_the_router_computes_in_fp32_whatever_surrounds_it(expert_graph: str, gate: str, smooth: str) -> None:
    router = router_of(gate=gate, expert_graph=expert_graph, smooth=smooth, adjacency_EE=random_graph())
    x_TD = tokens().bfloat16()
    reference = router(x_TD.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(x_TD)
    for out in (inside, router.bfloat16()(x_TD)):
        for name in ("logits_TE", "scores_TE", "weights_TK"):
            assert getattr(out, name).dtype == torch.float32
            assert torch.equal(getattr(out, name), getattr(reference, name))


@pytest.mark.parametrize("gate", ["linear", "cosine"])
def test_a_cast_router_still_trains_the_same_parameters_in_fp32(gate: str) -> None:
    router = router_of(gate=gate)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.1)
    router(tokens()).weights_TK[:, 0].sum().backward()
    router.bfloat16()
    before = [parameter.detach().clone() for parameter in router.parameters()]
    optimizer.step()
    for parameter, old in zip(router.parameters(), before, strict=True):
        assert parameter.dtype == torch.float32 and parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert not torch.equal(old, parameter)


@pytest.mark.parametrize("gate", ["linear", "cosine"])
@pytest.mark.parametrize("expert_graph", ["none", "symphony", "learnable"])
def test_routing_and_counting_compile_without_a_graph_break(expert_graph: str, gate: str) -> None:
    """``fullgraph=True`` raises at the first break."""
    router = router_of(gate=gate, expert_graph=expert_graph, adjacency_EE=random_graph()).train()

    def step(x_TD: Tensor) -> tuple[Tensor, Tensor]:
        out = router(x_TD)
        if expert_graph == "symphony":
            router.expert_graph.count(router.membership(out, None))
        return out.weights_TK, out.indices_TK

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    results = []
    for function in (compiled, step):
        values = function(tokens())
        results.append([*values, router.expert_graph.take_counts()] if expert_graph == "symphony" else values)
    for ours, reference in zip(*results, strict=True):
        assert torch.equal(ours, reference)


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
