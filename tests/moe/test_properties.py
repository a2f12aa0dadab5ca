"""What holds for every router and layer, whatever the shapes, the choices and the precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import SymphonyGraph, normalize_counts
from symphony_vlm.moe.layer import SparseMoE
from symphony_vlm.moe.losses import load_balancing_loss, router_z_loss
from symphony_vlm.moe.router import Router
from symphony_vlm.moe.token_graph import AttentionCall

HIDDEN = 6
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def configurations(draw: st.DrawFn) -> MoEConfig:
    """Any composition without a token graph, of up to nine experts; a single one included."""
    num_experts = draw(st.integers(1, 9))
    k = draw(st.integers(1, num_experts))
    parts: dict[str, Any] = {
        "gate": draw(st.sampled_from(["linear", "cosine"])),
        "score": draw(st.sampled_from(["softmax", "sigmoid"])),
        "expert_graph": draw(st.sampled_from(["none", "symphony", "fixed", "learnable", "shuffled"])),
        "smooth": draw(st.sampled_from(["probs", "logits"])),
        "applies_to": draw(st.sampled_from(["both", "selection", "weights"])),
        "renormalize": draw(st.booleans()),
        "counts": "soft" if k == 1 else draw(st.sampled_from(["hard", "soft"])),
    }
    if parts["expert_graph"] == "learnable":  # refused: no gradient would reach the graph
        parts["applies_to"] = "both" if parts["applies_to"] == "selection" else parts["applies_to"]
        parts["renormalize"] = parts["renormalize"] and (k > 1 or num_experts == 1)
    return MoEConfig(num_experts=num_experts, num_experts_per_tok=k, **parts)


def router_of(config: MoEConfig, seed: int) -> Router:
    router = Router(config, HIDDEN, layer_name="decoder layer 7")
    fill_(router, seed)
    return router.eval()


@torch.no_grad()
def fill_(router: Router, seed: int) -> None:
    """Clear preferences, and graphs that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    router.reset(generator)
    for parameter in router.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if router.expert_graph is not None and router.config.expert_graph != "learnable":
        size = router.config.num_experts
        router.expert_graph.adjacency_EE.copy_(torch.rand(size, size, generator=generator).softmax(-1))


def tokens(num_tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)


@EXAMPLES
@given(configurations(), st.integers(0, 12), st.sampled_from(DTYPES), st.integers(0, 1000))
def test_what_a_router_returns(config: MoEConfig, num_tokens: int, dtype: torch.dtype, seed: int) -> None:
    router = router_of(config, seed)
    out = router(tokens(num_tokens, seed, dtype))
    num_experts, k = config.num_experts, config.num_experts_per_tok
    assert out.weights_TK.shape == out.indices_TK.shape == (num_tokens, k)
    assert out.logits_TE.shape == out.scores_TE.shape == (num_tokens, num_experts)
    assert out.weights_TK.dtype == out.logits_TE.dtype == out.scores_TE.dtype == torch.float32
    assert ((out.indices_TK >= 0) & (out.indices_TK < num_experts)).all()
    assert all(len(set(row)) == k for row in out.indices_TK.tolist())
    # The selected are the largest, best first: nobody left out beats anybody chosen.
    chosen_TK = out.scores_TE.gather(-1, out.indices_TK)
    assert (chosen_TK[:, :-1] >= chosen_TK[:, 1:]).all()
    left_TE = out.scores_TE.scatter(-1, out.indices_TK, -torch.inf)
    assert (left_TE.max(-1).values <= chosen_TK[:, -1]).all()
    assert (out.weights_TK >= 0).all() and out.weights_TK.isfinite().all()
    if config.renormalize:
        # A sum of at most nine numbers below 1, each rounded at 6e-8.
        torch.testing.assert_close(out.weights_TK.sum(-1), torch.ones(num_tokens), atol=1e-6, rtol=0)


@EXAMPLES
@given(configurations(), st.integers(2, 12), st.integers(0, 1000))
def test_tokens_are_routed_one_by_one(config: MoEConfig, num_tokens: int, seed: int) -> None:
    """In which batch a token comes, and at what place, says nothing about its experts."""
    router = router_of(config, seed)
    x_TD = tokens(num_tokens, seed)
    together = router(x_TD).scores_TE
    alone = torch.cat([router(x_D[None]).scores_TE for x_D in x_TD])
    # A matrix product of another height may add in another order.
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@EXAMPLES
@given(configurations(), st.integers(1, 5), st.sampled_from([torch.nan, torch.inf, -torch.inf]), st.data())
def test_a_value_that_is_not_finite_is_an_error_naming_the_layer(
    config: MoEConfig, num_tokens: int, bad: float, data: st.DataObject
) -> None:
    x_TD = tokens(num_tokens, 0)
    x_TD[data.draw(st.integers(0, num_tokens - 1)), data.draw(st.integers(0, HIDDEN - 1))] = bad
    with pytest.raises(RuntimeError, match=r"decoder layer 7.*not finite"):
        router_of(config, 0)(x_TD)


@EXAMPLES
@given(configurations(), st.integers(1, 5))
def test_equal_logits_go_to_the_first_experts_in_equal_parts(config: MoEConfig, num_tokens: int) -> None:
    """With a graph whose rows all sum to the same, equal logits stay equal; here it is as it starts."""
    router = Router(config, HIDDEN).eval()
    router.reset()
    out = router(torch.zeros(num_tokens, HIDDEN))
    k = config.num_experts_per_tok
    assert out.logits_TE.eq(0).all()
    if config.expert_graph == "learnable":
        # Rows of a softmax sum to 1 but for their rounding, which may break a tie.
        assert all(len(set(row)) == k for row in out.indices_TK.tolist())
    else:
        assert out.indices_TK.tolist() == [list(range(k))] * num_tokens
    share = out.weights_TK[0, 0].item()
    torch.testing.assert_close(out.weights_TK, torch.full_like(out.weights_TK, share), atol=0, rtol=1e-6)
    if config.renormalize:
        assert share == pytest.approx(1 / k, rel=1e-6)


def loop_layer(layer: SparseMoE, x_TD: Tensor) -> Tensor:
    """The layer as ten lines: each token through each of its experts, in fp32."""
    routed = layer.router(x_TD)
    rows = []
    for x_D, weights, indices in zip(x_TD.float(), routed.weights_TK, routed.indices_TK.tolist(), strict=True):
        row = torch.zeros(HIDDEN)
        for weight, e in zip(weights, indices, strict=True):
            gate, up = (layer.experts.gate_up_proj[e].float() @ x_D).chunk(2)
            row = row + weight * (layer.experts.down_proj[e].float() @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros(0, HIDDEN)


@EXAMPLES
@given(configurations(), st.integers(0, 6), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 1000))
def test_a_layer_equals_the_loop_over_tokens_and_experts(
    config: MoEConfig, num_tokens: int, dtype: torch.dtype, seed: int
) -> None:
    """Few tokens and many experts: most experts are empty in most examples."""
    layer = SparseMoE(config, hidden_size=HIDDEN, intermediate_size=10, hidden_act="silu", layer_index=0)
    fill_(layer.router, seed)
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight.copy_(0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
    layer = layer.to(dtype).eval()
    x_TD = tokens(num_tokens, seed, dtype)
    with torch.no_grad():
        ours, reference = layer(x_TD[None])[0], loop_layer(layer, x_TD)
    assert ours.dtype == dtype
    # Outputs are of size 1 to 30. fp32: sums of 60 products in another order. bfloat16 has 8 bits: each of the four
    # roundings on the way (two products, the weighting, the sum) costs up to 0.4 % of the largest term.
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    largest = max(1.0, float(reference.abs().max())) if num_tokens else 1.0
    torch.testing.assert_close(ours.float(), reference, atol=tolerance * largest, rtol=0)


@st.composite
def counts(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """(co-selection counts of random sets, number of tokens); experts that nobody chose are common."""
    num_experts = draw(st.integers(1, 7))
    size = draw(st.integers(1, num_experts))
    rows = draw(st.lists(st.permutations(range(num_experts)), min_size=0, max_size=12))
    membership_TE = torch.zeros(len(rows), num_experts)
    for t, row in enumerate(rows):
        membership_TE[t, row[:size]] = 1
    return membership_TE.T @ membership_TE, torch.tensor(float(len(rows)))


NORMALIZATIONS = st.sampled_from(["row", "symmetric", "sinkhorn", "frequency"])


def graph_config(num_experts: int, **parts: Any) -> MoEConfig:
    k = min(2, num_experts)
    return MoEConfig(num_experts=num_experts, num_experts_per_tok=k, counts="hard" if k > 1 else "soft", **parts)


@EXAMPLES
@given(counts(), NORMALIZATIONS, st.sampled_from(["drop", "keep"]), st.floats(0, 1), st.randoms(use_true_random=False))
def test_normalised_counts_are_weights_and_do_not_depend_on_the_experts_names(
    counted: tuple[Tensor, Tensor], normalization: str, diagonal: str, strength: float, random: Any
) -> None:
    counts_EE, num_tokens = counted
    size = len(counts_EE)
    config = graph_config(size, normalization=normalization, diagonal=diagonal, strength=strength)
    target_EE = normalize_counts(counts_EE, num_tokens, config)
    assert target_EE.isfinite().all() and (target_EE >= 0).all()
    if normalization == "row":
        # Sums of at most seven numbers below 1.
        torch.testing.assert_close(target_EE.sum(1), torch.ones(size), atol=1e-6, rtol=0)
    order = list(range(size))
    random.shuffle(order)
    relabelled_EE = normalize_counts(counts_EE[order][:, order], num_tokens, config)
    # Row sums in another order; Sinkhorn's rounds amplify that a little where it converges slowly.
    tolerance = 1e-4 if normalization == "sinkhorn" else 1e-6
    torch.testing.assert_close(relabelled_EE, target_EE[order][:, order], atol=tolerance, rtol=0)


@EXAMPLES
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=8), st.integers(2, 7), st.floats(0, 1), st.floats(0, 1))
def test_a_moving_average_of_row_stochastic_matrices_is_one(
    seeds: list[int], num_experts: int, momentum: float, strength: float
) -> None:
    graph = SymphonyGraph(graph_config(num_experts, momentum=momentum, strength=strength))
    for seed in seeds:
        choices = torch.rand(6, num_experts, generator=torch.Generator().manual_seed(seed)).topk(2).indices
        graph.count(torch.zeros(6, num_experts).scatter_(1, choices, 1.0))
        graph.update(graph.take_counts())
    assert (graph.adjacency_EE >= 0).all() and int(graph.num_updates) == len(seeds)
    # Eight steps, each a rounding of sums of at most seven numbers below 1.
    torch.testing.assert_close(graph.adjacency_EE.sum(1), torch.ones(num_experts), atol=5e-6, rtol=0)


@EXAMPLES
@given(st.integers(1, 3), st.integers(1, 6), st.integers(0, 4), st.floats(0.05, 5), st.integers(0, 1000))
def test_a_similarity_graphs_rows_are_shares_among_the_visible(
    batch: int, size: int, past: int, temperature: float, seed: int
) -> None:
    config = MoEConfig(router="similarity_smoe", token_graph_temperature=temperature)
    graph = Router(config, HIDDEN).token_graph
    assert graph is not None
    graph.reset()
    generator = torch.Generator().manual_seed(seed)
    x_BLD = torch.randn(batch, past + size, HIDDEN, generator=generator)
    visible = torch.rand(batch, 1, size, past + size, generator=generator) < 0.5
    call = AttentionCall(shape=(batch, size), attention_mask=visible)
    weights_BSL = graph.weights(x_BLD[:, past:], graph.keys(x_BLD), call)
    # A softmax of at most ten numbers.
    torch.testing.assert_close(weights_BSL.sum(-1), torch.ones(batch, size), atol=1e-6, rtol=0)
    itself = torch.eye(past + size, dtype=torch.bool)[past:]
    assert not weights_BSL[~(visible[:, 0] | itself)].any()
    alone = ~visible[:, 0].masked_fill(itself, False).any(-1)
    assert (weights_BSL.diagonal(past, 1, 2)[alone] == 1).all()


@EXAMPLES
@given(configurations(), st.integers(1, 12), st.integers(0, 1000))
def test_losses_are_bounded_and_blind_to_padding(config: MoEConfig, num_tokens: int, seed: int) -> None:
    out = router_of(config, seed)(tokens(num_tokens, seed))
    mask_T = torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) < 0.7
    balance = load_balancing_loss(logits_TE=out.logits_TE, indices_TK=out.indices_TK, token_mask_T=mask_T)
    z = router_z_loss(logits_TE=out.logits_TE, token_mask_T=mask_T)
    # f sums to 1 with no entry above 1 / K, P sums to 1: E * sum f P is at most E / K.
    assert 0 <= balance <= config.num_experts / config.num_experts_per_tok + 1e-5
    assert z >= 0
    kept = {"logits_TE": out.logits_TE[mask_T], "indices_TK": out.indices_TK[mask_T]}
    torch.testing.assert_close(balance, load_balancing_loss(**kept), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(z, router_z_loss(logits_TE=kept["logits_TE"]), atol=1e-5, rtol=1e-5)
