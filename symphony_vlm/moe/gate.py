"""Gates: how a token's hidden state becomes one logit per expert.

Shape letters: T tokens, D hidden size, R size of the routing space, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.precision import KeepsPrecision

__all__ = ["CosineGate", "LinearGate", "draw_normal_", "make_gate"]


class LinearGate(KeepsPrecision):
    """A bias-free linear gate, the one of SMoE (arXiv 1701.06538) and GLaM (arXiv 2112.06905), always in fp32.

    Router logits in 16 bits change which experts win a close race; published MoE models keep the gate in fp32.
    """

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Logits ``[T, E]`` in fp32, whatever the precision of ``x_TD``."""
        return x_TD.float() @ self.weight.float().T

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draws N(0, 0.02) weights, unless a checkpoint has already provided them."""
        draw_normal_(self.weight, generator)


class CosineGate(KeepsPrecision):
    """The gate of XMoE (arXiv 2204.09179, section 3.2), always in fp32: a cosine in a space of few dimensions.

    ``logits_e = cos(P x, v_e) / temperature`` with a projection P and one embedding v_e per expert. Lengths do not
    count, so that no expert wins by the size of its weights alone, and logits are bounded by 1 / temperature.
    """

    # Far below the lengths that occur (0.06 for fresh embeddings), it keeps a token of zeros from dividing by zero.
    _SHORTEST = 1e-6

    def __init__(
        self, hidden_size: int, num_experts: int, *, size: int, temperature: float, learnable_temperature: bool
    ) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.empty(size, hidden_size, dtype=torch.float32))
        self.embeddings = nn.Parameter(torch.empty(num_experts, size, dtype=torch.float32))
        self.temperature = temperature
        """The temperature, where it is learnt its first value."""
        # Learnt as its logarithm, which cannot make it negative.
        self.log_temperature = nn.Parameter(torch.empty((), dtype=torch.float32)) if learnable_temperature else None

    def forward(self, x_TD: Tensor) -> Tensor:
        """Logits ``[T, E]`` in fp32, whatever the precision of ``x_TD``."""
        projected_TR = F.normalize(x_TD.float() @ self.projection.float().T, dim=-1, eps=self._SHORTEST)
        embeddings_ER = F.normalize(self.embeddings.float(), dim=-1, eps=self._SHORTEST)
        temperature = self.temperature if self.log_temperature is None else self.log_temperature.float().exp()
        return projected_TR @ embeddings_ER.T / temperature

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draws N(0, 0.02) weights, unless a checkpoint has already provided them."""
        draw_normal_(self.projection, generator)
        draw_normal_(self.embeddings, generator)
        if self.log_temperature is not None and not getattr(self.log_temperature, "_is_hf_initialized", False):
            self.log_temperature.fill_(math.log(self.temperature))


def make_gate(config: MoEConfig, hidden_size: int) -> LinearGate | CosineGate:
    """The gate of a composition (setting ``gate``)."""
    if config.gate == "cosine":
        return CosineGate(
            hidden_size,
            config.num_experts,
            size=config.cosine_dim or max(8, config.num_experts // 2),
            temperature=config.cosine_temperature,
            learnable_temperature=config.cosine_learnable_temperature,
        )
    return LinearGate(hidden_size, config.num_experts)


@torch.no_grad()
def draw_normal_(weight: Tensor, generator: torch.Generator | None = None, *, std: float = 0.02) -> None:
    """Fills a weight with N(0, std), unless a checkpoint has already provided it."""
    if not getattr(weight, "_is_hf_initialized", False):
        weight.copy_(std * torch.randn(weight.shape, generator=generator, dtype=torch.float32, device="cpu"))
