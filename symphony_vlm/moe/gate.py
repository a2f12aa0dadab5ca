"""Gates: how a token's hidden state becomes one logit per expert.

Shape letters: T tokens, D hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LinearGate"]


class LinearGate(nn.Module):
    """A bias-free linear gate, the one of SMoE (arXiv 1701.06538) and GLaM (arXiv 2112.06905), always in fp32.

    Router logits in 16 bits change which experts win a close race; published MoE models keep the gate in fp32.
    """

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Logits ``[T, E]`` in fp32, whatever the precision of ``x_TD`` and of an enclosing autocast."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return x_TD.float() @ self.weight.T

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draws N(0, 0.02) weights, unless a checkpoint has already provided them."""
        if not getattr(self.weight, "_is_hf_initialized", False):
            noise = torch.randn(self.weight.shape, generator=generator, dtype=torch.float32)
            self.weight.copy_(0.02 * noise)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self.weight.data
        super()._apply(fn, recurse)
        if self.weight.dtype != torch.float32:
            self.weight.data = before.to(device=self.weight.device)
        return self
