"""What Symphony costs over the plain router, as a share of the whole layer: router, dispatch and experts.

In training that is the graph product with its backward pass, the counting of co-selections, and the graph's step, here
charged to every micro-batch although it is taken once per optimizer step. The adjacency is the identity, so that both
routers must decide the same, bit for bit; the time of a product does not depend on its numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from benchmarks.measure import Case
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import SymphonyGraph
from symphony_vlm.moe.layer import SparseMoE

__all__ = ["cases"]


def cases(*, tiny: bool, device: torch.device) -> Iterator[Case]:
    """Tokens x hidden sizes x experts, K = 2, expert hidden size twice the hidden size."""
    sizes = product((32,), (16,), (4,)) if tiny else product((1024, 4096), (256, 512), (4, 8, 16))
    for num_tokens, hidden_size, num_experts in sizes:
        settings = {"tokens": num_tokens, "hidden": hidden_size, "experts": num_experts}
        yield _forward(settings, device)
        yield _forward_backward(settings, device)


def _forward(settings: dict[str, int], device: torch.device) -> Case:
    x_TD, _ = _inputs(settings, device)
    plain, symphony = _layer("smoe", settings, device), _layer("symphony_smoe", settings, device)

    @torch.no_grad()
    def route(layer: SparseMoE) -> Sequence[Tensor]:
        routed = layer.router(x_TD)
        return routed.weights_TK, routed.indices_TK

    @torch.no_grad()
    def run_layer() -> Sequence[Tensor]:
        return (plain(x_TD),)

    contenders = {"router": lambda: route(plain), "with graph": lambda: route(symphony)}
    return Case(settings={**settings, "pass": "forward"}, contenders=contenders, whole=("layer", run_layer))


def _forward_backward(settings: dict[str, int], device: torch.device) -> Case:
    x_TD, grad_TD = _inputs(settings, device)
    grad_TK = grad_TD[:, :2].contiguous()
    mask_T = torch.ones(len(x_TD), dtype=torch.bool, device=device)
    plain = _layer("smoe", settings, device).train()
    # One each: a step moves the graph, and counts add up.
    smoothing, counting, stepping = (_layer("symphony_smoe", settings, device).train() for _ in range(3))

    def route(layer: SparseMoE, *, count: bool = False, step: bool = False) -> Sequence[Tensor]:
        router, graph = layer.router, layer.router.expert_graph
        routed = router(x_TD)
        if count:
            assert isinstance(graph, SymphonyGraph)
            with torch.no_grad():
                graph.count(router.membership(routed, mask_T))
        gradients = torch.autograd.grad(routed.weights_TK, [x_TD, *router.gate.parameters()], grad_TK)
        if step:
            assert isinstance(graph, SymphonyGraph)
            graph.update(graph.take_counts())
        return routed.weights_TK, routed.indices_TK, *gradients

    def run_layer() -> Sequence[Tensor]:
        return torch.autograd.grad(plain(x_TD), [x_TD, *plain.parameters()], grad_TD)

    contenders = {
        "router": lambda: route(plain),
        "with graph": lambda: route(smoothing),
        "with counting too": lambda: route(counting, count=True),
        "with step too": lambda: route(stepping, count=True, step=True),
    }
    return Case(settings={**settings, "pass": "forward + backward"}, contenders=contenders, whole=("layer", run_layer))


def _layer(router: str, settings: dict[str, int], device: torch.device) -> SparseMoE:
    hidden_size = settings["hidden"]
    layer = SparseMoE(
        MoEConfig(router=router, num_experts=settings["experts"]),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        hidden_act="silu",
        layer_index=0,
    )
    layer.reset(seed=0)
    return layer.to(device).eval()


def _inputs(settings: dict[str, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and the gradient of the layer's output, ``[T, D]`` both."""
    generator = torch.Generator().manual_seed(0)
    shape = (settings["tokens"], settings["hidden"])
    x_TD = torch.randn(shape, generator=generator).to(device).requires_grad_()
    return x_TD, torch.randn(shape, generator=generator).to(device)
