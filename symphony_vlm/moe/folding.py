"""Folds the expert graph into a linear gate: A (W x) = (A W) x, after which no graph is left to compute.

Shape letters: D hidden size, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from symphony_vlm.errors import InputError
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.gate import LinearGate
from symphony_vlm.moe.router import Router

__all__ = ["folded_gate"]


@torch.no_grad()
def folded_gate(router: Router) -> Tensor:
    """The weight ``[E, D]``, fp32, of a linear gate that decides by itself as the whole router does in evaluation mode.

    Raises:
        InputError: there is none; the message names the setting that is in the way.
    """
    config = router.config
    _check_settings(config)
    if type(router) is not Router or type(router.gate) is not LinearGate:
        raise InputError(
            f"{config.router!r} is a router of your own ({type(router).__name__} with a {type(router.gate).__name__}); "
            "what it computes need not be a linear gate",
            where="moe.router",
            remedy="Only routers of this package can be folded.",
        )
    weight_ED: Tensor = router.gate.weight.detach()
    graph = router.expert_graph
    if graph is None or not _graph_at_inference(config):
        return weight_ED.clone()
    # In double precision, so that the folded weight is the nearest fp32 to the exact product.
    return (graph.adjacency_EE.double() @ weight_ED.double()).float()


def _check_settings(config: MoEConfig) -> None:
    """Gate, graphs and score must be, in evaluation mode, a softmax of one linear map."""
    needed = {"gate": "linear", "token_graph": "none", "score": "softmax"}
    if _graph_at_inference(config):
        needed["smooth"] = "logits"
        if not _choice_and_weights_agree(config):
            needed["applies_to"] = "both"
    for name, value in needed.items():
        found = getattr(config, name)
        if found != value:
            raise InputError(
                f"{found!r} cannot be folded into a linear gate: {_REASONS[name]}",
                where=f"moe.{name}",
                remedy=f"Only a model with {name}: {value} can be.",
            )


_REASONS = {
    "gate": "its logits are no linear map of the token",
    "token_graph": "a token's experts depend on other tokens",
    "score": "a softmax would weigh the chosen experts differently",
    "smooth": "a matrix behind the softmax cannot move in front of it",
    "applies_to": "one gate cannot choose with the graph and weigh without it, or the reverse",
}


def _graph_at_inference(config: MoEConfig) -> bool:
    """Whether the expert graph has a say in evaluation mode."""
    if config.expert_graph == "none" or config.active == "train":
        return False
    # All experts are chosen, so a graph for the choice alone changes nothing.
    return not (config.applies_to == "selection" and config.num_experts_per_tok == config.num_experts)


def _choice_and_weights_agree(config: MoEConfig) -> bool:
    """Whether values that both choose and weigh give the same result as the setting ``applies_to``."""
    if config.applies_to == "selection":  # a single weight that is divided by itself
        return config.num_experts_per_tok == 1 and config.renormalize
    if config.applies_to == "weights":  # with all experts there is no choice
        return config.num_experts_per_tok == config.num_experts
    return True
