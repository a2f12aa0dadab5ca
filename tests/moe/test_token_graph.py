"""Token graphs: the formula, who may listen to whom, and decoding with a KV cache."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import symphony_vlm as sv
from symphony_vlm.errors import InputError
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.recording import sparse_layers
from symphony_vlm.moe.router import Router
from symphony_vlm.moe.token_graph import AttentionCall, SimilarityGraph, TokenGraph

MakeModel = Callable[..., PreTrainedModel]
MakeIds = Callable[..., Tensor]

HIDDEN, NUM_EXPERTS = 8, 5
KINDS = ["similarity", "attention"]
SLIDING = [("mistral", "sdpa"), ("mistral", "eager"), ("gemma2", "eager"), ("gemma3_text", "sdpa")]
"""Families with sliding-window attention, and the implementations of it that they have."""
# Two layers of fp32 sums in another order, on logits of about 4; measured worst case 4e-6.
DECODING_TOLERANCE = 1e-5


def router_of(kind: str = "similarity", *, seed: int = 0, **settings: Any) -> Router:
    config = MoEConfig(**({"num_experts": NUM_EXPERTS, "router": "smoe", "token_graph": kind} | settings))
    router = Router(config, HIDDEN, layer_name="decoder layer 7")
    generator = torch.Generator().manual_seed(seed)
    router.reset(generator)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if router.config.expert_graph in ("symphony", "fixed"):
            router.expert_graph.adjacency_EE.copy_(torch.rand(NUM_EXPERTS, NUM_EXPERTS, generator=generator))
    return router.eval()


def graph_of(router: Router) -> TokenGraph:
    assert router.token_graph is not None
    return router.token_graph


def tokens(num_tokens: int = 7, *, seed: int = 1) -> Tensor:
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def attention(batch: int, size: int, *, heads: int = 2, seed: int = 2) -> Tensor:
    """Causal attention probabilities ``[B, H, S, S]``."""
    logits = torch.randn(batch, heads, size, size, generator=torch.Generator().manual_seed(seed))
    future = torch.ones(size, size, dtype=torch.bool).triu(1)
    return logits.masked_fill(future, float("-inf")).softmax(-1)


def upcycled(language_model: MakeModel, kind: str = "similarity", family: str = "llama", **settings: Any) -> Any:
    """A language model whose experts differ and whose gates have clear preferences, so that routing shows."""
    chosen = {key: settings.pop(key) for key in list(settings) if key in MoEConfig.__dataclass_fields__}
    model = language_model(family, **settings)
    sv.upcycle_(model, MoEConfig(**({"router": "smoe", "token_graph": kind, "expert_init_noise": 1.0} | chosen)))
    with torch.no_grad():
        for _, layer in sparse_layers(model):
            layer.router.gate.weight *= 50
    return model


def scores_of(model: PreTrainedModel, **inputs: Any) -> list[Tensor]:
    """What each sparse layer's selection saw in one forward pass, ``[B, S, E]``."""
    with torch.no_grad():
        ids = inputs["input_ids"]
        model(**inputs)
    return [out.scores_TE.unflatten(0, ids.shape) for out in model.routing.outputs.values()]


def positions_of(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


# The formula.


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("rank", "temperature"), [(None, 0.1), (None, 2.0), (3, 0.5)])
def test_similarity_is_the_formula_in_loops(rank: int | None, temperature: float, score: str) -> None:
    router = router_of(token_graph_dim=rank, token_graph_temperature=temperature, score=score)
    graph = graph_of(router)
    assert isinstance(graph, SimilarityGraph)
    w_s = (graph.query @ (torch.eye(HIDDEN) if graph.key is None else graph.key.T)).tolist()
    x = tokens()
    graph.call = AttentionCall(shape=(1, len(x)))
    out = router(x)
    values = (out.logits_TE.softmax(-1) if score == "softmax" else out.logits_TE.sigmoid()).tolist()
    u = x.tolist()
    for i in range(len(x)):
        similarity = [
            sum(u[i][a] * w_s[a][b] * u[j][b] for a in range(HIDDEN) for b in range(HIDDEN)) / (HIDDEN * temperature)
            for j in range(i + 1)
        ]
        largest = max(similarity)
        weights = [math.exp(s - largest) for s in similarity]
        mixed = [sum(w * values[j][e] for j, w in enumerate(weights)) / sum(weights) for e in range(NUM_EXPERTS)]
        # Similarities up to 50 in fp32 carry errors of about 1e-5, and so do the relative errors of the weights.
        assert out.scores_TE[i].tolist() == pytest.approx(mixed, abs=5e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_attention_is_the_formula_with_the_head_averaged_matrix(batch: int) -> None:
    router = router_of("attention")
    probabilities = attention(batch, 6)
    graph_of(router).call = AttentionCall(shape=(batch, 6), probabilities_BHSL=probabilities)
    out = router(tokens(6 * batch))
    values = out.logits_TE.softmax(-1).view(batch, 6, NUM_EXPERTS)
    expected = torch.einsum("bhij,bje->bie", probabilities / probabilities.shape[1], values).flatten(0, 1)
    torch.testing.assert_close(out.scores_TE, expected, atol=1e-6, rtol=0)
    assert not torch.allclose(out.scores_TE, values.flatten(0, 1), atol=1e-2)


@pytest.mark.parametrize("applies_to", ["both", "selection", "weights"])
@pytest.mark.parametrize("smooth", ["probs", "logits"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_composes_with_an_expert_graph(kind: str, smooth: str, applies_to: str) -> None:
    """r = S g A^T for gate values, in whatever order, and r = S score(z A^T) for logits."""
    router = router_of(kind, expert_graph="symphony", smooth=smooth, applies_to=applies_to)
    x = tokens()
    call = AttentionCall(shape=(1, len(x)), probabilities_BHSL=attention(1, len(x)))
    graph = graph_of(router)
    keys = graph.keys(x[None])
    weights_SL = graph.weights(x[None], keys, call)[0]
    graph.call = call
    out = router(x)
    assert router.expert_graph is not None
    adjacency_EE = router.expert_graph.adjacency_EE
    plain_TE = weights_SL @ out.logits_TE.softmax(-1)
    smooth_TE = plain_TE @ adjacency_EE.T
    other_order_TE = weights_SL @ (out.logits_TE.softmax(-1) @ adjacency_EE.T)
    # Sums of products of numbers below 1, in two orders.
    torch.testing.assert_close(smooth_TE, other_order_TE, atol=1e-6, rtol=0)
    if smooth == "logits":
        smooth_TE = weights_SL @ (out.logits_TE @ adjacency_EE.T).softmax(-1)
    select_TE = plain_TE if applies_to == "weights" else smooth_TE
    weigh_TE = plain_TE if applies_to == "selection" else smooth_TE
    torch.testing.assert_close(out.scores_TE, select_TE, atol=1e-6, rtol=0)
    weights_TK = weigh_TE.gather(-1, out.indices_TK)
    torch.testing.assert_close(out.weights_TK, weights_TK / weights_TK.sum(-1, keepdim=True), atol=1e-5, rtol=0)


def test_w_s_starts_as_cosine_similarity_over_the_temperature() -> None:
    router = Router(MoEConfig(router="similarity_smoe"), HIDDEN).eval()
    router.reset()
    x = torch.nn.functional.normalize(tokens(), dim=-1) * HIDDEN**0.5
    graph = graph_of(router)
    weights = graph.weights(x[None], graph.keys(x[None]), AttentionCall(shape=(1, len(x))))[0]
    cosines = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1) / 0.1
    expected = cosines.masked_fill(torch.ones_like(cosines, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=0)


def test_a_low_rank_starts_as_an_unbiased_estimate_of_the_full_one() -> None:
    hidden = 64
    x = torch.randn(hidden, generator=torch.Generator().manual_seed(0))
    estimates = []
    for seed in range(400):
        graph = SimilarityGraph(MoEConfig(router="similarity_smoe", token_graph_dim=16), hidden, "layer")
        graph.reset(torch.Generator().manual_seed(seed))
        assert graph.key is not None and torch.equal(graph.key, graph.query)
        estimates.append(float((x @ graph.query.detach()) @ (x @ graph.key.detach()) / (x @ x)))
    # The share of a vector's energy in 16 of 64 random directions has a standard deviation of about
    # sqrt(2 * 48 / (16 * 66)) = 0.3 relative to its mean; 400 draws give the mean to 1.5 %, four times that is 6 %.
    assert sum(estimates) / len(estimates) == pytest.approx(1.0, rel=0.06)


def test_a_rank_above_the_hidden_size_is_refused() -> None:
    with pytest.raises(InputError, match=r"moe.token_graph_dim: 9 must be at most the hidden size \(8\)"):
        router_of(token_graph_dim=9)


# Who may listen to whom.


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_graph_changes_routing(language_model: MakeModel, token_ids: MakeIds, kind: str) -> None:
    """Guards the tests below: what they hold still would otherwise stand still by itself."""
    ids = token_ids(2, 9)
    mixed, plain = (scores_of(upcycled(language_model, k), input_ids=ids)[0] for k in (kind, "none"))
    assert torch.allclose(mixed[:, 0], plain[:, 0], atol=1e-4)
    assert not torch.allclose(mixed[:, 1:], plain[:, 1:], atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_is_not_heard(language_model: MakeModel, token_ids: MakeIds, kind: str) -> None:
    model = upcycled(language_model, kind)
    ids = token_ids(2, 9)
    changed = ids.clone()
    changed[:, 5:] = token_ids(2, 4, seed=1)
    assert (changed != ids).any()
    for before, after in zip(scores_of(model, input_ids=ids), scores_of(model, input_ids=changed), strict=True):
        # Rows of a matrix product do not depend on other rows but for its blocking, a rounding of 1e-7.
        torch.testing.assert_close(before[:, :5], after[:, :5], atol=1e-5, rtol=0)
        assert not torch.allclose(before[:, 5:], after[:, 5:], atol=1e-2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_not_heard(
    language_model: MakeModel, token_ids: MakeIds, kind: str, side: str, implementation: str
) -> None:
    model = upcycled(language_model, kind, attn_implementation=implementation)
    ids, pad = token_ids(2, 6), torch.zeros(2, 4, dtype=torch.long)
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], dim=1)
    mask = (padded > 0).long()
    # Right beside the padded row stands one that is full: masks are per row.
    full = torch.cat([padded, token_ids(1, 10, seed=3)])
    mask = torch.cat([mask, torch.ones(1, 10, dtype=torch.long)])
    alone = scores_of(model, input_ids=ids)
    together = scores_of(model, input_ids=full, attention_mask=mask, position_ids=positions_of(mask))
    for expected, found in zip(alone, together, strict=True):
        assert found.isfinite().all()
        real = found[:2, 4:] if side == "left" else found[:2, :6]
        torch.testing.assert_close(real, expected, atol=DECODING_TOLERANCE, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_packed_documents_are_not_heard(
    language_model: MakeModel, token_ids: MakeIds, kind: str, implementation: str
) -> None:
    """The convention of transformers for padding-free batches: one row, positions that start again, no mask."""
    model = upcycled(language_model, kind, attn_implementation=implementation)
    documents = [token_ids(1, n, seed=n) for n in (5, 3, 6)]
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    packed = scores_of(model, input_ids=torch.cat(documents, 1), position_ids=positions, use_cache=False)
    alone = [scores_of(model, input_ids=document) for document in documents]
    for layer, found in enumerate(packed):
        expected = torch.cat([scores[layer] for scores in alone], dim=1)
        torch.testing.assert_close(found, expected, atol=DECODING_TOLERANCE, rtol=0)


@pytest.mark.parametrize(("family", "implementation"), SLIDING)
def test_a_sliding_window_limits_a_similarity_graph_too(
    language_model: MakeModel, token_ids: MakeIds, family: str, implementation: str
) -> None:
    """The first layer slides over three tokens. It alone is looked at: attention passes on what it has heard."""
    model = upcycled(language_model, family=family, sliding_window=3, attn_implementation=implementation)
    ids = token_ids(1, 9)
    changed = ids.clone()
    changed[0, 2] = 3 + (changed[0, 2] - 2) % 40
    before, after = scores_of(model, input_ids=ids)[0], scores_of(model, input_ids=changed)[0]
    # Token 2 is heard by 2, 3 and 4 directly, by 5 and 6 through the attention's output at 3 and 4.
    torch.testing.assert_close(before[:, 7:], after[:, 7:], atol=1e-5, rtol=0)
    assert not torch.allclose(before[:, 2:5], after[:, 2:5], atol=1e-3)


def test_the_mask_of_flash_attention_is_read_like_the_others() -> None:
    """It is two-dimensional, or absent with packed documents; the answers must be those of a full mask."""
    graph = graph_of(router_of())
    x = tokens(12).view(2, 6, HIDDEN)
    keys = graph.keys(x)
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    full = causal & padding.bool()[:, None, :]
    additive = torch.zeros(2, 1, 6, 6).masked_fill(~full[:, None], torch.finfo(torch.float32).min)
    found = [graph.weights(x, keys, AttentionCall((2, 6), mask)) for mask in (padding, full[:, None], additive)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not found[0][0, 2:, :2].any() and torch.equal(found[0][0, 0], torch.eye(6)[0])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    documents = graph.weights(x, keys, AttentionCall((2, 6), None, positions))
    assert not documents[:, 3:, :3].any()
    assert torch.equal(documents[:, :3], graph.weights(x, keys, AttentionCall((2, 6)))[:, :3])
    with pytest.raises(InputError, match="attn_implementation: a object as attention mask"):
        graph.weights(x, keys, AttentionCall((2, 6), object()))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_attention_graph_is_the_matrix_that_the_model_reports(
    language_model: MakeModel, token_ids: MakeIds, family: str
) -> None:
    model = upcycled(language_model, "attention", family)
    ids = token_ids(2, 7)
    reported = model(input_ids=ids, output_attentions=True).attentions
    for probabilities, out in zip(reported, model.routing.outputs.values(), strict=True):
        values = out.logits_TE.softmax(-1).unflatten(0, ids.shape)
        torch.testing.assert_close(out.scores_TE.unflatten(0, ids.shape), probabilities.mean(1) @ values)


def test_a_model_with_an_attention_graph_computes_probabilities(language_model: MakeModel) -> None:
    assert language_model().config._attn_implementation == "sdpa"
    assert upcycled(language_model, "attention").config._attn_implementation == "eager"
    assert upcycled(language_model, "similarity").config._attn_implementation == "sdpa"


def test_attention_without_probabilities_is_an_error_with_the_remedy(
    language_model: MakeModel, token_ids: MakeIds
) -> None:
    model = upcycled(language_model, "attention")
    model.set_attn_implementation("sdpa")
    with pytest.raises(InputError, match=r"decoder layer 0.*attn_implementation='eager'"):
        model(input_ids=token_ids(1, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_that_does_not_know_its_sequence_says_so(
    language_model: MakeModel, token_ids: MakeIds, kind: str
) -> None:
    with pytest.raises(RuntimeError, match=f"decoder layer 7.*token_graph: {kind}.*run the language model"):
        router_of(kind)(tokens())
    # A call that was used up, or is of another size, is no answer either.
    model = upcycled(language_model, kind)
    scores_of(model, input_ids=token_ids(1, 4))
    layer = next(layer for _, layer in sparse_layers(model))
    with pytest.raises(RuntimeError, match="run the language model"):
        layer(torch.zeros(1, 4, 16))
    graph_of(layer.router).call = AttentionCall(shape=(1, 3))
    with pytest.raises(RuntimeError, match="run the language model"):
        layer(torch.zeros(1, 4, 16))


# Decoding.


@pytest.mark.parametrize("chunks", [[1] * 12, [12], [5, 3, 1, 1, 2], [11, 1]], ids=str)
@pytest.mark.parametrize("expert_graph", ["none", "symphony"])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_and_uncached_logits_agree_with_left_padding(
    language_model: MakeModel, token_ids: MakeIds, kind: str, expert_graph: str, chunks: list[int]
) -> None:
    model = upcycled(language_model, kind, expert_graph=expert_graph, smooth="logits", applies_to="weights")
    for _, layer in sparse_layers(model):
        if layer.router.expert_graph is not None:
            layer.router.expert_graph.adjacency_EE.copy_(torch.rand(4, 4).softmax(-1))
    _assert_decoding_agrees(model, token_ids(2, 12), chunks)


@pytest.mark.parametrize("chunks", [[1] * 12, [12], [5, 3, 1, 1, 2]], ids=str)
@pytest.mark.parametrize(("family", "implementation"), SLIDING)
def test_cached_and_uncached_logits_agree_with_a_sliding_window(
    language_model: MakeModel, token_ids: MakeIds, family: str, chunks: list[int], implementation: str
) -> None:
    model = upcycled(language_model, family=family, sliding_window=4, attn_implementation=implementation)
    _assert_decoding_agrees(model, token_ids(2, 12), chunks)


@torch.no_grad()
def _assert_decoding_agrees(model: PreTrainedModel, ids: Tensor, chunks: list[int]) -> None:
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = positions_of(mask)
    whole = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache, start, logits = None, 0, []
    for size in chunks:
        part = slice(start, start := start + size)
        more = {"position_ids": positions[:, part], "past_key_values": cache, "use_cache": True}
        out = model(input_ids=ids[:, part], attention_mask=mask[:, :start], **more)
        cache = out.past_key_values
        logits.append(out.logits)
        assert cache.get_seq_length() == start
    difference = (torch.cat(logits, dim=1) - whole).abs() * mask[:, :, None]
    assert difference.max() <= DECODING_TOLERANCE * whole.abs().max().clamp(min=1)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_the_same_with_and_without_a_cache(
    language_model: MakeModel, token_ids: MakeIds, kind: str, options: dict[str, Any]
) -> None:
    model = upcycled(language_model, kind)
    ids = token_ids(3, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "eos_token_id": None, **options}
    cached, plain = (model.generate(ids * mask, use_cache=use, **arguments) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_can_be_cropped_selected_and_repeated(language_model: MakeModel, token_ids: MakeIds, kind: str) -> None:
    model = upcycled(language_model, kind)
    ids = token_ids(3, 9)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :7], use_cache=True).past_key_values
        cache.crop(-2)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        found = model(input_ids=ids[[2, 2, 0, 0], 5:], past_key_values=cache).logits
        expected = model(input_ids=ids[[2, 2, 0, 0]], use_cache=False).logits[:, 5:]
    torch.testing.assert_close(found, expected, atol=4 * DECODING_TOLERANCE, rtol=0)


def test_a_cache_made_without_its_configuration_grows_too(language_model: MakeModel, token_ids: MakeIds) -> None:
    model = upcycled(language_model)
    ids = token_ids(2, 8)
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:, :5], past_key_values=cache)
        found = model(input_ids=ids[:, 5:], past_key_values=cache).logits
        expected = model(input_ids=ids, use_cache=False).logits[:, 5:]
    torch.testing.assert_close(found, expected, atol=4 * DECODING_TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_fixed_size_is_refused(language_model: MakeModel, token_ids: MakeIds, kind: str) -> None:
    model = upcycled(language_model, kind)
    with pytest.raises(InputError, match=r"StaticCache cannot hold.*dynamic"):
        model(input_ids=token_ids(1, 4), past_key_values=StaticCache(config=model.config, max_cache_len=8))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_filled_by_another_model_is_refused(language_model: MakeModel, token_ids: MakeIds, kind: str) -> None:
    cache = language_model()(input_ids=token_ids(1, 4), use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match=r"decoder layer 0: the KV cache holds 5 tokens but gate values of 1"):
        upcycled(language_model, kind)(input_ids=token_ids(1, 1), past_key_values=cache)


# Training.


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_nothing_even_with_two_passes_before_the_backward_pass(
    language_model: MakeModel, token_ids: MakeIds, kind: str
) -> None:
    """The recomputation of the first pass must hear its own attention, not that of the second."""
    ids = [token_ids(2, 8), token_ids(2, 8, seed=1)]
    gradients = []
    for checkpointing in (False, True):
        model = upcycled(language_model, kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        losses = [model(input_ids=i, labels=i, use_cache=False).loss for i in ids]
        sum(losses).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*gradients, strict=True))


@pytest.mark.parametrize("rank", [None, 4])
def test_the_similarity_matrix_is_trained_by_the_loss(
    language_model: MakeModel, token_ids: MakeIds, rank: int | None
) -> None:
    model = upcycled(language_model, token_graph_dim=rank).train()
    ids = token_ids(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if ".token_graph." in name}
    assert found == ({"query"} if rank is None else {"query", "key"})
    for name, parameter in model.named_parameters():
        if ".token_graph." in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_listens_to_its_own_attention(
    language_model: MakeModel, token_ids: MakeIds, kind: str, duplicate: Callable[[Any], Any]
) -> None:
    model = upcycled(language_model, kind)
    ids = token_ids(2, 8)
    before = scores_of(model, input_ids=ids)
    twin = duplicate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for expected, found in zip(before, scores_of(twin, input_ids=ids), strict=True):
        assert torch.equal(expected, found)


def test_a_bfloat16_model_keeps_its_token_graph_in_fp32(language_model: MakeModel, token_ids: MakeIds) -> None:
    model = upcycled(language_model).bfloat16()
    out = model(input_ids=token_ids(1, 5), use_cache=True)
    assert {p.dtype for name, p in model.named_parameters() if ".router." in name} == {torch.float32}
    assert [layer.keys.dtype for layer in out.past_key_values.layers] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert all(record.scores_TE.dtype == torch.float32 for record in model.routing.outputs.values())


def test_a_decoder_layer_without_attention_is_refused(language_model: MakeModel) -> None:
    model = language_model()
    for layer in model.model.layers:
        layer.mixer = layer.self_attn
        del layer.self_attn
    with pytest.raises(InputError, match="decoder layer 0 has no self_attn"):
        sv.upcycle_(_WithoutAForwardPass(model), MoEConfig(router="similarity_smoe"))


class _WithoutAForwardPass(torch.nn.Module):
    """Upcycling looks at a model's logits first; this one has lost the part that would compute them."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.config, self.device = model.model, model.config, model.device

    def forward(self, **_: Any) -> Any:
        return type("Output", (), {"logits": torch.zeros(1)})()
