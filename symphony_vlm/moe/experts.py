"""The experts of one layer: E gated feed-forward networks with stacked weights.

Shape letters: T tokens, D hidden size, F expert hidden size, E experts, K experts per token, N = T * K routed tokens.

The stacking is the Hugging Face layout of Mixtral and Qwen3-MoE (``gate_up_proj [E, 2F, D]``, ``down_proj [E, D, F]``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

__all__ = ["Experts"]


class Experts(nn.Module):
    """E SwiGLU-type experts; a token's output is the weighted sum over its K experts. No token is ever dropped."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, hidden_act: str) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.act_fn = ACT2FN[hidden_act]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.gate_up_proj.shape[0]

    def forward(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        """Dispatches tokens to their experts and combines the results: ``[T, D] -> [T, D]``.

        Args:
            x_TD: tokens.
            weights_TK: fp32 combination weights.
            indices_TK: which experts.
        """
        k = indices_TK.shape[1]
        # Sorting the N routed tokens by expert makes each expert's input one contiguous block. A stable order keeps
        # the sums, and so the rounding, reproducible.
        order_N = torch.argsort(indices_TK.flatten(), stable=True)
        token_N = order_N // k
        counts_E = torch.bincount(indices_TK.flatten(), minlength=self.num_experts)
        blocks = x_TD[token_N].split(counts_E.tolist())
        # `unbind` and not indexing: the backward of w[e] is a zero tensor of the size of all experts for each e, a
        # cost that grows with E squared; the backward of unbind is one stack.
        outputs = [
            self._expert(block, gate_up, down)
            for block, gate_up, down in zip(blocks, self.gate_up_proj.unbind(0), self.down_proj.unbind(0), strict=True)
        ]
        weighted_ND = torch.cat(outputs) * weights_TK.flatten()[order_N, None].to(x_TD.dtype)
        return torch.zeros_like(x_TD).index_add(0, token_N, weighted_ND.to(x_TD.dtype))

    def _expert(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate) * up, down)

    @torch.no_grad()
    def reset(self, std: float) -> None:
        """Draws N(0, std) weights, unless a checkpoint has already provided them."""
        for weight in (self.gate_up_proj, self.down_proj):
            if not getattr(weight, "_is_hf_initialized", False):
                weight.normal_(0.0, std)
