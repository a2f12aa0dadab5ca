"""A router is a composition: gate -> [expert graph] -> top-K.

Shape letters: T tokens, D hidden size, E experts, K experts per token.

Symphony (arXiv 2510.16411) is the baseline router plus one matrix product, `self.expert_graph(...)` below.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import ExpertGraph
from symphony_vlm.moe.gate import LinearGate

__all__ = ["Router", "RouterOutput"]


@dataclass(frozen=True)
class RouterOutput:
    """What a router decided for T tokens. Losses and statistics are pure functions of it."""

    weights_TK: Tensor
    """fp32 combination weights of the selected experts, best first."""
    indices_TK: Tensor
    """Their indices."""
    logits_TE: Tensor
    """fp32 gate logits, before any graph."""
    scores_TE: Tensor
    """fp32 gate values that the selection saw, after the graph where there is one."""


class Router(nn.Module):
    """Chooses K of E experts for every token and weights them.

    Args:
        config: the composition (gate, score, graph, selection).
        hidden_size: D.
        layer_name: names the layer in error messages.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, layer_name: str = "moe") -> None:
        super().__init__()
        self.config = config
        self.layer_name = layer_name
        self.gate = LinearGate(hidden_size, config.num_experts)
        self.expert_graph = ExpertGraph(config) if config.expert_graph == "symphony" else None

    def forward(self, x_TD: Tensor) -> RouterOutput:
        """Routes ``[T, D]`` tokens.

        Raises:
            RuntimeError: a logit is not finite; the message names the layer.
        """
        logits_TE = self.gate(self._jitter(x_TD))
        # An assertion on the device: it costs no host synchronisation on an accelerator.
        torch._assert_async(torch.isfinite(logits_TE).all(), self._not_finite)

        plain_TE = self._score(logits_TE)
        smooth_TE = self._smooth(logits_TE, plain_TE)
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

    def _smooth(self, logits_TE: Tensor, plain_TE: Tensor) -> Tensor:
        if self.expert_graph is None or not self.expert_graph.is_active:
            return plain_TE
        if self.config.smooth == "logits":
            return self._score(self.expert_graph(logits_TE))
        return self.expert_graph(plain_TE)

    def _jitter(self, x_TD: Tensor) -> Tensor:
        noise = self.config.jitter_noise
        if not self.training or noise == 0.0:
            return x_TD
        return x_TD * torch.empty_like(x_TD).uniform_(1 - noise, 1 + noise)

    @property
    def _not_finite(self) -> str:
        return (
            f"{self.layer_name}: the router's logits are not finite; training has diverged. "
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
        """Initialises what no checkpoint provided: a fresh gate, the identity as graph."""
        self.gate.reset(generator)
        if self.expert_graph is not None:
            self.expert_graph.reset()
