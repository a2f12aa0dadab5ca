"""The sparse feed-forward layer that takes the place of a dense one.

Shape letters: B batch, S sequence, T = B * S tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.experts import Experts
from symphony_vlm.moe.router import Router, RouterOutput

__all__ = ["SparseMoE"]


class SparseMoE(nn.Module):
    """Router, dispatch, experts, combine.

    Args:
        config: the layer's settings.
        hidden_size: D.
        intermediate_size: hidden size of each expert.
        hidden_act: name of the experts' activation, e.g. ``silu``.
        layer_index: index of the decoder layer, also the router's seed offset.
    """

    def __init__(
        self, config: MoEConfig, *, hidden_size: int, intermediate_size: int, hidden_act: str, layer_index: int
    ) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.router = Router(config, hidden_size, layer_name=f"decoder layer {layer_index}")
        self.experts = Experts(config.num_experts, hidden_size, intermediate_size, hidden_act)
        self.routed: dict[int, RouterOutput] | None = None
        """Where outputs are put while the model's forward pass runs (`RoutingRecorder`); None outside of it, so that
        the second forward of activation checkpointing leaves no trace."""

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """``[B, S, D] -> [B, S, D]``."""
        x_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
        routed = self.router(x_TD)
        if self.routed is not None:
            self.routed[self.layer_index] = routed
        return self.experts(x_TD, routed.weights_TK, routed.indices_TK).view_as(hidden_BSD)

    @torch.no_grad()
    def reset(self, *, seed: int = 0, std: float = 0.02) -> None:
        """Initialises what no checkpoint provided. The gate's seed contains the layer: no two routers start equal."""
        self.router.reset(torch.Generator().manual_seed(1000003 * seed + self.layer_index))
        self.experts.reset(std)
