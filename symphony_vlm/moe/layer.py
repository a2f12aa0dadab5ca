"""The sparse feed-forward layer that takes the place of a dense one.

Shape letters: B batch, S sequence, T = B * S tokens, D hidden size, O output size (D in a transformer).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.experts import Experts
from symphony_vlm.moe.router import RouterOutput, make_router

__all__ = ["SparseMoE"]

_SEED_OFFSETS = {"language": 0, "vision": 10_000, "projector": 20_000, "router": 0, "experts": 100_000}


class SparseMoE(nn.Module):
    """Router, dispatch, experts, combine.

    With a shared expert, ``y = experts(x) + sigmoid(shared_expert_gate(x)) * shared_expert(x)`` as in Qwen2-MoE.

    Args:
        config: the layer's settings.
        hidden_size: D.
        intermediate_size: hidden size of each expert.
        hidden_act: the experts' activation, by name, e.g. ``silu``, or as a module.
        layer_index: index of the layer in its transformer, also the router's seed offset.
        module: which part of the model it is in (setting ``modules``).
        output_size: O; default D.
        gated: see `Experts`.
        bias: see `Experts`.
        shared_expert: a dense layer ``[T, D] -> [T, O]`` that every token also passes.
        dropout: of the experts' combined output in training, where the dense layer had one.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str | nn.Module,
        layer_index: int,
        module: str = "language",
        output_size: int | None = None,
        gated: bool = True,
        bias: bool = False,
        shared_expert: nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.module = module
        self.key: int | str = layer_index if module == "language" else f"{module}.{layer_index}"
        """Names the layer in records and statistics: its index in the decoder, elsewhere with the module in front."""
        label = "decoder layer" if module == "language" else f"{module} layer"
        self.router = make_router(config, hidden_size, layer_name=f"{label} {layer_index}")
        self.experts = Experts(
            config.num_experts,
            hidden_size,
            intermediate_size,
            hidden_act,
            output_size=output_size,
            gated=gated,
            bias=bias,
            implementation=config.experts_implementation,
        )
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.shared_expert = shared_expert
        self.shared_expert_gate = None if shared_expert is None else nn.Linear(hidden_size, 1, bias=False)
        self.routed: dict[int | str, RouterOutput] | None = None
        """Where outputs are put while the model's forward pass runs (`RoutingRecorder`); None outside of it, so that
        the second forward of activation checkpointing leaves no trace."""

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """``[B, S, D] -> [B, S, O]``, or any other dimensions in front."""
        x_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
        routed = self.router(x_TD)
        if self.routed is not None:
            self.routed[self.key] = routed
        y_TO = self.dropout(self.experts(x_TD, routed.weights_TK, routed.indices_TK))
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            y_TO = y_TO + self.shared_expert_gate(x_TD).sigmoid() * self.shared_expert(x_TD)
        y_BSO: Tensor = y_TO.unflatten(0, hidden_BSD.shape[:-1])
        return y_BSO

    def generator(self, seed: int, purpose: str) -> torch.Generator:
        """A random state of its own for each layer of a model, so that no two routers start equal."""
        offset = self.layer_index + _SEED_OFFSETS[self.module] + _SEED_OFFSETS[purpose]
        return torch.Generator().manual_seed(1000003 * seed + offset)

    @torch.no_grad()
    def reset_routing(self, seed: int = 0) -> None:
        """Initialises of the routing what no checkpoint provided."""
        self.router.reset(self.generator(seed, "router"))
        gate = self.shared_expert_gate
        if gate is not None and not getattr(gate.weight, "_is_hf_initialized", False):
            gate.weight.zero_()  # a sigmoid of 1/2

    @torch.no_grad()
    def reset(self, *, seed: int = 0, std: float = 0.02) -> None:
        """Initialises what no checkpoint provided."""
        self.reset_routing(seed)
        self.experts.reset(std)
