"""A router is a composition: gate -> [token graph] -> [expert graph] -> top-K.

Shape letters: T tokens, D hidden size, E experts, K experts per token.

Symphony (arXiv 2510.16411) is the baseline router plus one matrix product, `graph(...)` in `Router.gate_values`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from symphony_vlm.errors import InputError
from symphony_vlm.moe.configuration import PARTS, PRESETS, MoEConfig
from symphony_vlm.moe.expert_graph import make_expert_graph
from symphony_vlm.moe.gate import make_gate
from symphony_vlm.moe.precision import KeepsPrecision
from symphony_vlm.moe.token_graph import make_token_graph

__all__ = ["NOT_FINITE", "Router", "RouterOutput", "make_router", "register_router"]

NOT_FINITE = "the router's logits are not finite"
"""Part of the message with which a router refuses to route."""


class RouterOutput(NamedTuple):
    """What a router decided for T tokens. Losses and statistics are pure functions of it.

    A tuple, because DeepSpeed ZeRO-3 looks for the tensors of a module's output in nothing else, and leaves the
    parameters of a module without any ungathered in the backward pass.
    """

    weights_TK: Tensor
    """fp32 combination weights of the selected experts, best first."""
    indices_TK: Tensor
    """Their indices."""
    logits_TE: Tensor
    """fp32 gate logits, before any graph."""
    scores_TE: Tensor
    """fp32 gate values that the selection saw, after the graph where there is one."""


class Router(KeepsPrecision):
    """Chooses K of E experts for every token and weights them, in fp32 whatever surrounds it.

    A router of your own overrides `logits` or replaces a part after ``super().__init__`` (docs/routing.md).

    Args:
        config: the composition (gate, score, graphs, selection).
        hidden_size: D.
        layer_name: names the layer in error messages.
    """

    gate: Any
    """A module with ``forward(x_TD)``, logits in fp32, and ``reset(generator)``."""

    def __init__(self, config: MoEConfig, hidden_size: int, layer_name: str = "moe") -> None:
        super().__init__()
        self.config = config
        self.layer_name = layer_name
        self.gate = make_gate(config, hidden_size)
        self.token_graph = make_token_graph(config, hidden_size, layer_name)
        self.expert_graph = make_expert_graph(config)

    @property
    def is_trained(self) -> bool:
        """Whether training moves the gate. A frozen router's graph is not counted either."""
        return any(parameter.requires_grad for parameter in self.gate.parameters())

    def forward(self, x_TD: Tensor) -> RouterOutput:
        """Routes ``[T, D]`` tokens.

        Raises:
            RuntimeError: a logit is not finite; the message names the layer. Or a token graph was not told which
                tokens form a sequence.
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            return self._route(self._jitter(x_TD))

    def logits(self, x_TD: Tensor) -> Tensor:
        """The gate's logits ``[T, E]``, fp32."""
        logits_TE: Tensor = self.gate(x_TD)
        return logits_TE

    def gate_values(self, x_TD: Tensor, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Gate values ``[T, E]`` without and with the expert graph; both after the token graph, if there is one.

        The token graph mixes the rows of gate values and the expert graph their columns, so that their order is
        immaterial (smooth: probs); where the expert graph smooths logits it must come first.
        """
        graph = self.expert_graph if self.expert_graph is not None and self.expert_graph.is_active else None
        plain_TE = smooth_TE = self._score(logits_TE)
        if graph is not None and self.config.smooth == "logits":
            smooth_TE = self._score(graph(logits_TE))
        if self.token_graph is not None:
            if smooth_TE is plain_TE:
                plain_TE = smooth_TE = self.token_graph(x_TD, plain_TE)[0]
            else:
                plain_TE, smooth_TE = self.token_graph(x_TD, plain_TE, smooth_TE)
        if graph is not None and self.config.smooth == "probs":
            smooth_TE = graph(plain_TE)
        return plain_TE, smooth_TE

    def _route(self, x_TD: Tensor) -> RouterOutput:
        logits_TE = self.logits(x_TD)
        # An assertion on the device: it costs no host synchronisation on an accelerator.
        torch._assert_async(torch.isfinite(logits_TE).all(), self._not_finite)
        plain_TE, smooth_TE = self.gate_values(x_TD, logits_TE)
        select_TE = plain_TE if self.config.applies_to == "weights" else smooth_TE
        weigh_TE = plain_TE if self.config.applies_to == "selection" else smooth_TE

        # A stable sort, unlike topk, breaks ties the same way on every device: the lower index wins.
        order_TE = torch.sort(select_TE, dim=-1, descending=True, stable=True).indices
        indices_TK = order_TE[:, : self.config.num_experts_per_tok]
        weights_TK = weigh_TE.gather(-1, indices_TK)
        if self.config.renormalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return RouterOutput(weights_TK=weights_TK, indices_TK=indices_TK, logits_TE=logits_TE, scores_TE=select_TE)

    def _score(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.softmax(-1) if self.config.score == "softmax" else logits_TE.sigmoid()

    def _jitter(self, x_TD: Tensor) -> Tensor:
        noise = self.config.jitter_noise
        if not self.training or noise == 0.0:
            return x_TD
        return x_TD * torch.empty_like(x_TD).uniform_(1 - noise, 1 + noise)

    @property
    def _not_finite(self) -> str:
        return (
            f"{self.layer_name}: {NOT_FINITE}; training has diverged. "
            "Lower the learning rate, or raise moe.z_loss_weight."
        )

    def membership(self, output: RouterOutput, token_mask_T: Tensor | None) -> Tensor:
        """What the graph counts, ``[T, E]`` fp32: the selected sets one-hot, or their weights with ``counts: soft``.

        Args:
            output: of `forward`.
            token_mask_T: bool ``[T]``, False for padding, whose rows become zero; None counts every token.
        """
        scores_TE = output.scores_TE
        if self.config.counts == "hard":
            membership_TE = torch.zeros_like(scores_TE).scatter_(-1, output.indices_TK, 1.0)
        else:
            k = max(2, self.config.num_experts_per_tok)
            top = scores_TE.topk(min(k, scores_TE.shape[-1]), dim=-1)
            weights = top.values / top.values.sum(-1, keepdim=True)
            membership_TE = torch.zeros_like(scores_TE).scatter_(-1, top.indices, weights)
        return membership_TE if token_mask_T is None else membership_TE * token_mask_T[:, None]

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Initialises what no checkpoint provided: a fresh gate, graphs that change nothing or little."""
        self.gate.reset(generator)
        if self.token_graph is not None:
            self.token_graph.reset(generator)
        if self.expert_graph is not None:
            self.expert_graph.reset()


_CLASSES: dict[str, type[Router]] = {}
"""Classes of registered routers by their names; every other router is a `Router`."""


def register_router(name: str, **parts: Any) -> Callable[[type[Router]], type[Router]]:
    """Class decorator that makes a router of your own available as ``router: <name>``.

    A saved model stores the name. Import the module that registers it before loading.

    Args:
        name: for `MoEConfig.router`.
        parts: what the preset chooses of ``gate``, ``expert_graph``, ``token_graph`` and ``layers``.

    Raises:
        InputError: the name is taken by a router of this package, or a part is unknown.
    """
    if name in PRESETS and name not in _CLASSES:
        problem = f"{name!r} is a router of this package"
        raise InputError(problem, where="register_router", remedy="Choose another name.")
    for part in parts:
        if part not in PARTS:
            raise InputError(f"{part!r} is not one of {', '.join(PARTS)}", where=f"register_router({name!r})")

    def register(cls: type[Router]) -> type[Router]:
        PRESETS[name] = dict(parts)
        _CLASSES[name] = cls
        return cls

    return register


def make_router(config: MoEConfig, hidden_size: int, layer_name: str = "moe") -> Router:
    """The router that a configuration names."""
    return _CLASSES.get(config.router, Router)(config, hidden_size, layer_name)
