"""Router losses: pure functions of a router's output.

Shape letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["load_balancing_loss", "router_z_loss"]


def load_balancing_loss(*, logits_TE: Tensor, indices_TK: Tensor, token_mask_T: Tensor | None = None) -> Tensor:
    """E * sum_e f_e P_e, 1.0 when balanced (Switch Transformer, arXiv 2101.03961, eq. 4, extended to all K choices).

    Args:
        logits_TE: fp32 gate logits; P_e is the mean of their softmax.
        indices_TK: selected experts; f_e is the share of all T * K slots, not of the first choices alone: a router
            whose second choice has collapsed must be seen.
        token_mask_T: bool, False for padding; None counts every token.

    Returns:
        Scalar fp32.
    """
    num_experts = logits_TE.shape[-1]
    mask_T = _mask(token_mask_T, logits_TE)
    num_tokens = mask_T.sum().clamp(min=1)
    slots_TE = torch.zeros_like(logits_TE).scatter_add_(
        -1, indices_TK, torch.ones_like(indices_TK, dtype=torch.float32)
    )
    load_E = (slots_TE * mask_T[:, None]).sum(0) / (num_tokens * indices_TK.shape[-1])
    mean_gate_E = (logits_TE.softmax(-1) * mask_T[:, None]).sum(0) / num_tokens
    return num_experts * (load_E * mean_gate_E).sum()


def router_z_loss(*, logits_TE: Tensor, token_mask_T: Tensor | None = None) -> Tensor:
    """mean(logsumexp(logits)^2), which keeps logits small (ST-MoE, arXiv 2202.08906, eq. 5). Scalar fp32."""
    mask_T = _mask(token_mask_T, logits_TE)
    return (logits_TE.logsumexp(-1).square() * mask_T).sum() / mask_T.sum().clamp(min=1)


def _mask(token_mask_T: Tensor | None, logits_TE: Tensor) -> Tensor:
    return logits_TE.new_ones(logits_TE.shape[0]) if token_mask_T is None else token_mask_T.float()
