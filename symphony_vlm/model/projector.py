"""Projectors: from the vision tower's features to the language model's embedding space.

Shape letters: N images, P features per image, C vision hidden size, D model hidden size.
"""

from __future__ import annotations

from torch import nn

__all__ = ["build_projector"]


def build_projector(kind: str, vision_hidden_size: int, hidden_size: int) -> nn.Module:
    """A module ``[N, P, C] -> [N, P, D]``.

    Args:
        kind: ``linear`` (LLaVA) or ``mlp2x_gelu`` (LLaVA-1.5: linear, GELU, linear).
        vision_hidden_size: C.
        hidden_size: D.
    """
    if kind == "linear":
        return nn.Linear(vision_hidden_size, hidden_size)
    return nn.Sequential(nn.Linear(vision_hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))
