"""Colours, matplotlib settings and drawings that the report and `inspection` share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["GRID", "INK", "MUTED", "PAPER", "SERIES", "STYLE", "draw_adjacency"]

INK, MUTED, GRID, PAPER = "#111213", "#68696a", "#d9dadb", "#fefdfc"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Okabe and Ito's palette."""
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "symphony-vlm",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "hatch.linewidth": 0.7,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
}


def draw_adjacency(axes: Axes, weights: np.ndarray, *, top: float | None = None, fontsize: float | None = 7.5) -> Any:
    """Heat map of an adjacency matrix, of up to 8 experts with the weights in the cells.

    Args:
        axes: where to draw.
        weights: ``[E, E]``, NaN for cells that stay empty.
        top: weight at the end of the colour scale; default: the largest one.
        fontsize: of the weights in the cells, points; None: without them.

    Returns:
        The image, for a colour bar.
    """
    n = len(weights)
    top = float(np.nanmax(weights)) if top is None else top
    if n <= 16:
        image: Any = axes.pcolormesh(weights, cmap="cividis", vmin=0, vmax=top, edgecolors=PAPER, linewidth=0.6)
        axes.set_xticks(np.arange(n) + 0.5, [str(e) for e in range(n)])
        axes.set_yticks(np.arange(n) + 0.5, [str(e) for e in range(n)])
    else:  # One pixel a weight: thousands of paths would make the page slow.
        image = axes.imshow(weights, cmap="cividis", vmin=0, vmax=top, interpolation="nearest", extent=(0, n, n, 0))
    axes.set(aspect="equal", xlim=(0, n), ylim=(n, 0))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    if n <= 8 and fontsize is not None:
        for row, column in np.argwhere(~np.isnan(weights)):
            label = f"{weights[row, column]:.2f}".replace("0.", ".")
            color = "#ffffff" if weights[row, column] < 0.55 * top else "#000000"
            text = axes.text(column + 0.5, row + 0.5, label, ha="center", va="center", fontsize=fontsize, color=color)
            # It lies inside the axes; a layout engine need not measure thousands of these.
            text.set_in_layout(False)
    return image
