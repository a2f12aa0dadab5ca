"""Folding: one linear gate that decides as a router with its expert graph does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from symphony_vlm.errors import InputError
from symphony_vlm.moe import router as router_module
from symphony_vlm.moe.configuration import PRESETS, MoEConfig
from symphony_vlm.moe.folding import folded_gate
from symphony_vlm.moe.router import Router, RouterOutput, make_router, register_router

HIDDEN, EXPERTS, TOKENS = 16, 6, 400


def trained_router(seed: int = 0, **settings: Any) -> Router:
    """A router whose gate and graph are large enough to matter; the graph is row-stochastic, as training leaves it."""
    config = MoEConfig(**({"num_experts": EXPERTS, "num_experts_per_tok": 3, "smooth": "logits"} | settings))
    router = make_router(config, HIDDEN).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for name, buffer in router.named_buffers():
            if name.endswith("adjacency_EE"):
                rows = torch.rand(buffer.shape, generator=generator)
                buffer.copy_(rows / rows.sum(1, keepdim=True))
    return router


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decide(weight_ED: Tensor, x_TD: Tensor, *, k: int, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    """What transformers' routers do with a gate's weight; written out as there, independent of ours."""
    probabilities = (x_TD @ weight_ED.T).softmax(-1)
    weights, indices = torch.topk(probabilities, k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), indices


def check_same(router: Router, *, k: int = 3, renormalize: bool = True) -> None:
    x_TD = tokens()
    with torch.no_grad():
        ours: RouterOutput = router(x_TD)
    weights, indices = decide(folded_gate(router), x_TD, k=k, renormalize=renormalize)
    assert torch.equal(indices, ours.indices_TK)
    # A (W x) against (A W) x: logits of about 10 in fp32, whose last bit is 1e-6; a softmax passes that on.
    torch.testing.assert_close(weights, ours.weights_TK, atol=1e-5, rtol=0)


GRAPHS = [
    (kind, active) for kind in ("none", "symphony", "learnable", "fixed") for active in ("always", "eval", "train")
]
GRAPHS.remove(("learnable", "eval"))  # no such setting: nothing would train the graph


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("kind", "active"), GRAPHS)
def test_the_folded_gate_decides_as_the_router(kind: Any, active: Any, renormalize: bool) -> None:
    router = trained_router(expert_graph=kind, active=active, renormalize=renormalize)
    check_same(router, renormalize=renormalize)


def test_the_graphs_of_these_tests_change_decisions() -> None:
    """Guards the test above: with the gate alone it would fail."""
    router = trained_router()
    _, without = decide(router.gate.weight, tokens(), k=3)
    _, folded = decide(folded_gate(router), tokens(), k=3)
    assert (without != folded).any(1).float().mean() > 0.3


def test_the_product_is_rounded_once() -> None:
    router = trained_router()
    assert router.expert_graph is not None
    exact = router.expert_graph.adjacency_EE.double() @ router.gate.weight.double()
    assert torch.equal(folded_gate(router), exact.float())
    assert folded_gate(router).dtype == torch.float32


@pytest.mark.parametrize(
    "settings", [{"expert_graph": "none"}, {"active": "train"}, {"active": "train", "smooth": "probs"}]
)
def test_without_an_active_graph_the_gate_stays_what_it_is(settings: dict[str, Any]) -> None:
    router = trained_router(**settings)
    folded = folded_gate(router)
    assert torch.equal(folded, router.gate.weight)
    assert folded.data_ptr() != router.gate.weight.data_ptr(), "what is exported must not move with the model"


@pytest.mark.parametrize(
    "settings",
    [
        # One weight, divided by itself: how it was smoothed is immaterial.
        {"num_experts_per_tok": 1, "counts": "soft", "applies_to": "selection"},
        # All experts are chosen: only the weights matter.
        {"num_experts_per_tok": EXPERTS, "applies_to": "weights"},
        {"num_experts_per_tok": EXPERTS, "applies_to": "selection"},
        {"num_experts_per_tok": EXPERTS, "applies_to": "selection", "smooth": "probs"},
    ],
)
def test_a_graph_for_half_of_the_decision_folds_where_the_other_half_is_trivial(settings: dict[str, Any]) -> None:
    router = trained_router(**settings)
    x_TD = tokens()
    with torch.no_grad():
        ours = router(x_TD)
    weights, indices = decide(folded_gate(router), x_TD, k=settings["num_experts_per_tok"])
    # Compared expert by expert: where all are chosen, their order says nothing.
    dense = [torch.zeros(TOKENS, EXPERTS).scatter(1, i, w) for i, w in ((indices, weights), _chosen(ours))]
    torch.testing.assert_close(dense[0], dense[1], atol=1e-5, rtol=0)


def _chosen(output: RouterOutput) -> tuple[Tensor, Tensor]:
    return output.indices_TK, output.weights_TK


OBSTACLES: list[tuple[str, dict[str, Any]]] = [
    ("moe.gate", {"gate": "cosine"}),
    ("moe.gate", {"router": "symphony_xmoe"}),
    ("moe.score", {"score": "sigmoid"}),
    ("moe.token_graph", {"token_graph": "similarity"}),
    ("moe.token_graph", {"token_graph": "attention"}),
    ("moe.smooth", {"smooth": "probs"}),
    ("moe.smooth", {"smooth": "probs", "active": "eval"}),
    ("moe.applies_to", {"applies_to": "selection"}),
    ("moe.applies_to", {"applies_to": "weights"}),
    ("moe.applies_to", {"applies_to": "selection", "num_experts_per_tok": 1, "renormalize": False, "counts": "soft"}),
]


@pytest.mark.parametrize(("where", "settings"), OBSTACLES, ids=[str(settings) for _, settings in OBSTACLES])
def test_what_cannot_be_folded_is_refused_by_the_name_of_its_setting(where: str, settings: dict[str, Any]) -> None:
    router = trained_router(**settings)
    with pytest.raises(InputError) as caught:
        folded_gate(router)
    name = where.removeprefix("moe.")
    assert caught.value.where == where
    assert repr(getattr(router.config, name)) in caught.value.problem
    assert caught.value.remedy is not None and f"{name}: " in caught.value.remedy


@pytest.mark.parametrize(
    "settings", [settings for where, settings in OBSTACLES if where in ("moe.smooth", "moe.applies_to")]
)
def test_what_is_refused_for_its_graph_could_indeed_not_be_folded_as_the_rest_is(settings: dict[str, Any]) -> None:
    """The refusals are not caution: A W decides differently."""
    router = trained_router(**settings)
    graph: Any = router.expert_graph
    x_TD = tokens()
    with torch.no_grad():
        ours = router(x_TD)
    config = router.config
    k = config.num_experts_per_tok
    weights, indices = decide(graph.adjacency_EE @ router.gate.weight, x_TD, k=k, renormalize=config.renormalize)
    assert not torch.equal(indices, ours.indices_TK) or (weights - ours.weights_TK).abs().max() > 0.01


def test_a_router_of_ones_own_is_refused() -> None:
    try:

        @register_router("doubled", gate="linear")
        class Doubled(Router):
            def logits(self, x_TD: Tensor) -> Tensor:
                return 2 * super().logits(x_TD)

        with pytest.raises(InputError, match=r"moe\.router: 'doubled' is a router of your own \(Doubled"):
            folded_gate(trained_router(router="doubled"))
    finally:
        PRESETS.pop("doubled", None)
        router_module._CLASSES.pop("doubled", None)


def test_a_replaced_gate_is_refused() -> None:
    router = trained_router()
    router.gate = nn.Sequential(nn.Linear(HIDDEN, EXPERTS))
    with pytest.raises(InputError, match=r"moe\.router: .*Sequential"):
        folded_gate(router)
