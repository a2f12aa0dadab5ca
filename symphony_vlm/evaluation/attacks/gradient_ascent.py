"""Projected gradient ascent in an l-infinity ball around a picture, with momentum (Madry et al., arXiv 1706.06083).

The arithmetic alone, for any differentiable function; `pgd` gives it a model's loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from symphony_vlm.errors import InputError

__all__ = ["Ascent", "ascend", "require_direction"]

MOMENTUM = 0.9
STEP = 2.5
"""The step times their number, in units of the budget: the whole ball can be crossed."""


@dataclass(frozen=True, kw_only=True)
class Ascent:
    """The best point found."""

    point: Tensor
    """Of the largest loss among all iterates, the start included."""
    loss: float
    start_loss: float
    gradient_l1: float
    """Mean absolute gradient at the start."""


def ascend(
    loss_and_gradient: Callable[[Tensor], tuple[float, Tensor]], z: Tensor, *, eps: float, steps: int, start: Tensor
) -> Ascent:
    """Maximises a loss within ``|x - z| <= eps`` and [0, 1].

    ``v <- 0.9 v + sign(gradient)``; ``x <- P(x + 2.5 eps / steps sign(v))``, P the projection onto the ball, then
    onto [0, 1].

    Args:
        loss_and_gradient: of a point, a tensor of z's shape.
        z: the centre, in [0, 1].
        eps: radius.
        steps: gradients taken.
        start: offset of the first point from z, within the ball.

    Raises:
        InputError: the first gradient is zero or not finite: there is nothing to follow, and a score on such a picture
            would look like robustness.
    """
    x = (z + start).clamp(0, 1)
    velocity = torch.zeros_like(z)
    best, best_loss, start_loss, size = x, -float("inf"), float("nan"), 0.0
    for step in range(steps + 1):
        loss, gradient = loss_and_gradient(x)
        if step == 0:
            start_loss, size = loss, require_direction(gradient)
        if loss > best_loss:
            best, best_loss = x, loss
        if step < steps:
            velocity = MOMENTUM * velocity + gradient.sign()
            offset = (x - z + STEP * eps / steps * velocity.sign()).clamp(-eps, eps)
            x = (z + offset).clamp(0, 1)
    return Ascent(point=best, loss=best_loss, start_loss=start_loss, gradient_l1=size)


def require_direction(gradient: Tensor) -> float:
    """The mean absolute gradient.

    Raises:
        InputError: it is zero or not finite.
    """
    size = float(gradient.abs().mean())
    if not gradient.isfinite().all() or size == 0:
        kind = "zero" if size == 0 else "not finite"
        raise InputError(f"the gradient of the loss at the picture is {kind}, so it cannot be attacked")
    return size
