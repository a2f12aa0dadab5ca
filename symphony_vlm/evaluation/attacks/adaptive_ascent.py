"""Projected gradient ascent that chooses its step by itself: APGD (Croce and Hein 2020, arXiv 2003.01690)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from symphony_vlm.evaluation.attacks.gradient_ascent import Ascent, require_direction

__all__ = ["ascend_adaptively"]

MOMENTUM = 0.75
ENOUGH_RISES = 0.75
"""Share of a window's steps above which the step size is good."""
FIRST_WINDOW, SHORTER_BY, SHORTEST_WINDOW = 0.22, 0.03, 0.06
"""Of the number of steps."""


def ascend_adaptively(
    loss_and_gradient: Callable[[Tensor], tuple[float, Tensor]], z: Tensor, *, eps: float, steps: int, start: Tensor
) -> Ascent:
    """Maximises a loss within ``|x - z| <= eps`` and [0, 1]; arguments, result, errors as of `gradient_ascent.ascend`.

    The step starts at ``eps``. At the end of each window it is halved, and the best point taken up again, if the loss
    rose in at most three quarters of the window's steps, or if the step was kept last time and the best loss has not
    grown since.
    """

    def project(x: Tensor) -> Tensor:
        return (z + (x - z).clamp(-eps, eps)).clamp(0, 1)

    x = before = project(z + start)
    loss, gradient = loss_and_gradient(x)
    start_loss, size = loss, require_direction(gradient)
    best, best_loss, best_gradient = x, loss, gradient
    window = max(int(FIRST_WINDOW * steps), 1)
    step, in_window, rises, halved, best_before = eps, 0, 0, True, loss
    for number in range(steps):
        ahead = project(x + step * gradient.sign())
        share = 1.0 if number == 0 else MOMENTUM
        x, before = project(x + share * (ahead - x) + (1 - share) * (x - before)), x
        last, (loss, gradient) = loss, loss_and_gradient(x)
        rises += loss > last
        in_window += 1
        if loss > best_loss:
            best, best_loss, best_gradient = x, loss, gradient
        if in_window == window:
            halved = rises <= ENOUGH_RISES * window or (not halved and best_loss <= best_before)
            if halved:
                step, x, gradient = step / 2, best, best_gradient
            best_before, in_window, rises = best_loss, 0, 0
            window = max(window - max(int(SHORTER_BY * steps), 1), max(int(SHORTEST_WINDOW * steps), 1))
    return Ascent(point=best, loss=best_loss, start_loss=start_loss, gradient_l1=size)
