"""Figures of `inspection`: load, expert graphs and their drift as PNG, readable from 1 to some 40 layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from symphony_vlm.evaluation.drawing import GRID, INK, MUTED, PAPER, SERIES, STYLE, draw_adjacency

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from symphony_vlm.evaluation.inspection import Inspection, LayerFacts

__all__ = ["write_figures"]

_DOTS_PER_INCH = 150
_MAX_PANELS_WITH_WEIGHTS = 16
_LUMINANCE = (0.299, 0.587, 0.114)
_MAX_NAMED_LINES = len(SERIES)
"""More lines than colours are coloured by depth, with a scale instead of names."""


def write_figures(inspection: Inspection, folder: Path) -> list[Path]:
    """Writes ``load.png`` and, as far as the model has graphs and a log, ``adjacency.png`` and ``drift.png``."""
    graphs = [layer for layer in inspection.layers if layer.graph is not None and layer.num_experts > 1]
    paths = [_draw_load(inspection, folder / "load.png")]
    if graphs:
        paths.append(_draw_graphs(inspection, graphs, folder / "adjacency.png"))
    if any(len(curve["step"]) > 1 for curve in inspection.drift.values()):
        paths.append(_draw_drift(inspection, folder / "drift.png"))
    return paths


@contextmanager
def _figure(path: Path, *, title: str, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure in the report's look, saved at the end."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11.5)
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=_DOTS_PER_INCH, facecolor=PAPER, metadata={"Software": None})


def _draw_load(inspection: Inspection, path: Path) -> Path:
    """Heat map, a row per layer: each expert's load over the even share; beside it the coefficient of variation."""
    layers = inspection.layers
    n_layers, n_experts = len(layers), max(layer.num_experts for layer in layers)
    relative = np.full((n_layers, n_experts), np.nan)
    for row, layer in enumerate(layers):
        relative[row, : layer.num_experts] = np.multiply(layer.load["load"], layer.num_experts)
    width, height = min(max(2.0, 0.5 * n_experts), 10.0), max(1.4, 0.4 + 0.3 * n_layers)
    title = f"Expert load of {inspection.router}\nmeasured on {inspection.load_source}"
    with _figure(path, title=title, size=(width + 3.0, height + 1.2)) as figure:
        heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=[width, 1.4])
        # Symmetric about the even share: an unused expert is as dark as one with twice its share.
        image = heat.pcolormesh(relative, cmap="PuOr", vmin=0, vmax=2, edgecolors=PAPER, linewidth=0.6)
        if n_experts <= 16:
            for row, column in np.argwhere(~np.isnan(relative)):
                share = relative[row, column] / layers[row].num_experts
                color = INK if np.dot(image.to_rgba(relative[row, column])[:3], _LUMINANCE) > 0.5 else PAPER
                text = heat.text(
                    column + 0.5, row + 0.5, f"{share:.0%}", ha="center", va="center", fontsize=8, color=color
                )
                text.set_in_layout(False)
        _expert_ticks(heat, n_experts, axis="x", most=16)
        heat.set_yticks(np.arange(n_layers) + 0.5, [layer.layer for layer in layers])
        heat.set(xlim=(0, n_experts), ylim=(n_layers, 0), xlabel="expert", ylabel="layer")
        bars.barh(np.arange(n_layers) + 0.5, [layer.load["load_cv"] for layer in layers], 0.7, color=SERIES[0])
        bars.set_xlabel("coefficient\nof variation")
        bars.grid(axis="x")
        bars.set_axisbelow(True)
        for axes in (heat, bars):
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        bar = figure.colorbar(
            image, ax=[heat, bars], extend="max", pad=0.02, label="load / even share", aspect=7 * height
        )
        bar.set_ticks([0, 0.5, 1, 1.5, 2])
        bar.outline.set_visible(False)
    return path


def _draw_graphs(inspection: Inspection, layers: list[LayerFacts], path: Path) -> Path:
    """A heat map per layer. The diagonal, several times heavier than any edge, is left out of the common scale."""
    n_columns = _columns(len(layers))
    n_rows = math.ceil(len(layers) / n_columns)
    matrices = []
    for layer in layers:
        assert layer.graph is not None
        weights = np.array(layer.graph["adjacency"], dtype=float)
        np.fill_diagonal(weights, np.nan)
        matrices.append(weights)
    # A graph that has not moved has no edges; the scale must not be empty then.
    top = max(max(float(np.nanmax(weights)) for weights in matrices), 1e-6)
    width = 2.5 if len(layers) > 1 else 3.4
    title = f"Expert graphs of {inspection.router}\nEdges on one scale; self weights (the diagonal) in the titles"
    size = (max(n_columns * width, 4.2) + 0.9, n_rows * (width + 0.25) + 0.75)
    with _figure(path, title=title, size=size) as figure:
        grid = figure.subplots(n_rows, n_columns, squeeze=False)
        image: Any = None
        for index, axes in enumerate(grid.flat):
            if index >= len(layers):
                axes.axis("off")
                continue
            layer, graph = layers[index], layers[index].graph
            assert graph is not None
            image = draw_adjacency(
                axes, matrices[index], top=top, fontsize=6.5 if len(layers) <= _MAX_PANELS_WITH_WEIGHTS else None
            )
            axes.set_title(f"layer {layer.layer}   self {graph['self_weight']:.2f}", fontsize=9.5)
            axes.set_facecolor(GRID)
            axes.tick_params(labelsize=7.5 if layer.num_experts > 8 else 8.5)
            _expert_ticks(axes, layer.num_experts, axis="x", most=8)
            _expert_ticks(axes, layer.num_experts, axis="y", most=8)
            if index % n_columns == 0:
                axes.set_ylabel("receiving expert")
            if index + n_columns >= len(layers):
                axes.set_xlabel("giving expert")
        bar = figure.colorbar(image, ax=grid, shrink=min(1.0, 3.5 / size[1]), pad=0.02, label="weight of the edge")
        bar.outline.set_visible(False)
    return path


def _columns(n_panels: int) -> int:
    """Between a square and twice as wide as high, with the fewest empty places."""
    choices = range(math.ceil(math.sqrt(n_panels)), math.ceil(math.sqrt(2 * n_panels)) + 1)
    return min(choices, key=lambda columns: -n_panels % columns)


def _draw_drift(inspection: Inspection, path: Path) -> Path:
    """A line per layer: how far its graph moved in a step, over the steps."""
    curves = {layer: curve for layer, curve in inspection.drift.items() if curve["step"]}
    title = f"Drift of the expert graphs of {inspection.router}"
    with _figure(path, title=title, size=(7.0, 3.6)) as figure:
        axes = figure.subplots()
        if len(curves) <= _MAX_NAMED_LINES:
            for color, (layer, curve) in zip(SERIES, curves.items(), strict=False):
                axes.plot(curve["step"], curve["drift"], color=color, label=f"layer {layer}", marker=".")
            figure.legend(loc="outside right upper", frameon=False)
        else:
            _draw_by_depth(figure, axes, curves)
        axes.set(xlabel="optimizer step", ylabel=r"mean $\Vert A_t - A_{t-1}\Vert_F$ per step")
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
    return path


def _draw_by_depth(figure: Figure, axes: Axes, curves: dict[str, dict[str, list[float]]]) -> None:
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    shades = ScalarMappable(Normalize(0, len(curves) - 1), mpl.colormaps["cividis"])
    colors = shades.to_rgba(np.arange(len(curves)))
    for color, curve in zip(colors, curves.values(), strict=True):
        axes.plot(curve["step"], curve["drift"], color=color, linewidth=1.2)
    bar = figure.colorbar(shades, ax=axes, pad=0.02, label="layer")
    ticks = [int(tick) for tick in np.unique(np.linspace(0, len(curves) - 1, 6).round())]
    bar.set_ticks(ticks, labels=[list(curves)[i] for i in ticks])
    bar.outline.set_visible(False)


def _expert_ticks(axes: Axes, n_experts: int, *, axis: str, most: int) -> None:
    """Experts' numbers in the middle of their cells, every 2nd, 4th, ... where there are more than `most`."""
    step = 2 ** max(0, math.ceil(math.log2(n_experts / most)))
    shown = np.arange(0, n_experts, step)
    set_ticks = axes.set_xticks if axis == "x" else axes.set_yticks
    set_ticks(shown + 0.5, [str(expert) for expert in shown], color=MUTED)
