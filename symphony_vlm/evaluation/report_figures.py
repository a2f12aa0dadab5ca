"""Figures of the report: inline SVG that follows the page's colours, fonts and width.

One SVG per panel; the page lays panels out in a grid, so that text keeps its size on a narrow screen. Series differ in
colour (Okabe and Ito's palette), marker and line style. Colours are written as CSS variables with the printed colour as
fallback, which is what lets one drawing serve the light and the dark page.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from symphony_vlm.evaluation.drawing import GRID, INK, MUTED, PAPER, SERIES, STYLE, draw_adjacency

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Series",
    "adjacency_panel",
    "coefficient_panel",
    "graph_panel",
    "legend",
    "line_panel",
    "load_panel",
    "severity_panel",
]

_MARKERS = ("o", "s", "^", "D", "v", "P")
_LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), "-", (0, (5, 2)))
_DASHES = ("", "7 3", "1.5 2.5", "7 3 1.5 3", "", "7 3")
_SHAPES = (
    '<circle cx="17" cy="7" r="4"/>',
    '<rect x="13.2" y="3.2" width="7.6" height="7.6"/>',
    '<path d="M17 2.5 21.5 11h-9z"/>',
    '<path d="M17 2 22 7 17 12 12 7z"/>',
    '<path d="M17 11.5 12.5 3h9z"/>',
    '<path d="M15.5 3h3v2.500h2.500v3h-2.500v2.500h-3v-2.500h-2.500v-3h2.500z"/>',
)
_HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "oo")
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", PAPER: "card"} | {c: f"s{i}" for i, c in enumerate(SERIES)}
_MAX_POINTS = 240
_MAX_EDGES = 60
"""Edges drawn in a graph, heaviest first: more would be a ball of wool, and the heat map has them all."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a panel. ``style`` is the model's number: the same model looks the same everywhere."""

    label: str
    style: int
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


def legend(labels: Sequence[str]) -> str:
    """HTML legend of the models, in their order."""
    entries = []
    for index, label in enumerate(labels):
        k = index % len(SERIES)
        dash = f' stroke-dasharray="{_DASHES[k]}"' if _DASHES[k] else ""
        entries.append(
            f'<span class="key"><svg viewBox="0 0 34 14" width="34" height="14" aria-hidden="true" '
            f'style="color:var(--s{k})"><path d="M0 7h34" stroke="currentColor" stroke-width="2"{dash}/>'
            f'<g fill="currentColor">{_SHAPES[k]}</g></svg>{html.escape(label)}</span>'
        )
    return f'<p class="legend">{"".join(entries)}</p>'


def severity_panel(*, title: str, series: Sequence[Series], limits: tuple[float, float], ylabel: str) -> str:
    """Score over severity with interval bands; severity 0 is the clean cell."""

    def draw(axes: Axes) -> None:
        for one in series:
            _line(axes, one)
            if one.low is not None and one.high is not None:
                axes.fill_between(
                    np.asarray(one.x, dtype=float),
                    _floats(one.low),
                    _floats(one.high),
                    color=SERIES[one.style % len(SERIES)],
                    alpha=0.18,
                    linewidth=0,
                )
        axes.set_ylim(*limits)
        axes.set_xticks(sorted({int(x) for one in series for x in one.x}))
        axes.set_xlabel("severity (0 = clean)")
        axes.set_ylabel(ylabel)

    shown = "; ".join(f"{one.label}: " + ", ".join(_short(y) for y in one.y) for one in series)
    return _panel(draw, title=title, alt=f"{ylabel} under {title} by severity. {shown}")


def line_panel(*, title: str, series: Sequence[Series], xlabel: str, ylabel: str) -> str:
    """Lines over training steps; long logs are drawn as means of equal blocks."""

    def draw(axes: Axes) -> None:
        for one in series:
            x, y = _thinned(one.x, _floats(one.y))
            _line(axes, Series(label=one.label, style=one.style, x=list(x), y=list(y)), every=max(1, len(x) // 8))
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)

    ends = "; ".join(f"{one.label}: {_short(one.y[0])} to {_short(one.y[-1])}" for one in series if len(one.y))
    return _panel(draw, title=title, alt=f"{ylabel}, {title}, first to last value. {ends}")


def load_panel(*, title: str, loads: Sequence[tuple[str, int, Sequence[float]]], top: float) -> str:
    """Share of the tokens of each expert, one bar per model (label, style, loads) and a line at the even share."""
    n_experts = max(len(load) for _, _, load in loads)

    def draw(axes: Axes) -> None:
        width = 0.8 / len(loads)
        for position, (_, style, load) in enumerate(loads):
            k = style % len(SERIES)
            x = np.arange(len(load)) + (position - (len(loads) - 1) / 2) * width
            axes.bar(x, load, width * 0.92, color=SERIES[k], hatch=_HATCHES[k], edgecolor=PAPER, linewidth=0)
        axes.set_ylim(0, max(top, 1.1 / n_experts))
        axes.axhline(1 / n_experts, color=INK, linewidth=1, linestyle=(0, (3, 2)))
        if n_experts <= 16:
            axes.set_xticks(range(n_experts))
        axes.set_xlabel("expert (dashed: even share)")
        axes.set_ylabel("share of slots")

    shown = "; ".join(f"{label}: " + ", ".join(_short(x) for x in load) for label, _, load in loads)
    return _panel(draw, title=title, alt=f"Expert load of {title}. {shown}")


def coefficient_panel(
    *, title: str, style: int, layers: Mapping[str, tuple[Sequence[float], Sequence[float]]], top: float
) -> str:
    """Coefficient of variation of the load over steps: a thin line per layer and a thick one for their mean."""

    def draw(axes: Axes) -> None:
        color = SERIES[style % len(SERIES)]
        for name, (x, y) in layers.items():
            steps, values = _thinned(x, np.asarray(y, dtype=float))
            axes.plot(steps, values, color=color, alpha=0.55, linewidth=0.9)
            if len(layers) <= 8:
                axes.annotate(f" {name}", (steps[-1], values[-1]), color=MUTED, fontsize=8, va="center")
        mean_x, mean_y = _mean_line(list(layers.values()))
        axes.plot(mean_x, mean_y, color=color, linewidth=2.2, linestyle=_LINES[style % len(_LINES)])
        axes.set_ylim(0, top)
        axes.set_xlabel("step")
        axes.set_ylabel("coefficient of variation")

    shown = "; ".join(f"layer {name}: {_short(y[0])} to {_short(y[-1])}" for name, (_, y) in layers.items())
    return _panel(draw, title=title, alt=f"Coefficient of variation of the expert load, {title}. {shown}")


def graph_panel(*, title: str, adjacency: Sequence[Sequence[float]]) -> str:
    """The experts on a circle; an edge is as thick as its weight, a node's ring as thick as its self weight."""
    weights = np.asarray(adjacency, dtype=float)

    def draw(axes: Axes) -> None:
        _draw_graph(axes, weights)

    off = weights - np.diag(np.diag(weights))
    i, j = np.unravel_index(int(off.argmax()), off.shape)
    alt = f"Expert graph of {title}: {len(weights)} experts, heaviest edge {j} to {i} with weight {_short(off[i, j])}"
    return _panel(draw, title=title, alt=alt, size=(3.5, 3.1), bare=True)


def adjacency_panel(*, title: str, adjacency: Sequence[Sequence[float]]) -> str:
    """The adjacency as a heat map."""
    weights = np.asarray(adjacency, dtype=float)
    n = len(weights)

    def draw(axes: Axes) -> None:
        image = draw_adjacency(axes, weights)
        axes.set_xlabel("gives: expert")
        axes.set_ylabel("receives: expert")
        bar = axes.figure.colorbar(image, ax=axes, shrink=0.75, pad=0.03)
        bar.outline.set_visible(False)

    return _panel(draw, title=title, alt=f"Heat map of the {n} x {n} adjacency of {title}", size=(3.5, 3.1))


def _draw_graph(axes: Axes, weights: np.ndarray) -> None:
    from matplotlib.patches import FancyArrowPatch

    n = len(weights)
    angle = np.pi / 2 - 2 * np.pi * np.arange(n) / n
    x, y = np.cos(angle), np.sin(angle)
    off = weights - np.diag(np.diag(weights))
    heaviest = max(float(off.max()), 1e-12)
    symmetric = np.allclose(weights, weights.T, atol=1e-4)
    visible = np.tril(off) if symmetric else off
    for flat in np.argsort(-visible, axis=None, kind="stable")[:_MAX_EDGES]:
        i, j = divmod(int(flat), n)
        share = visible[i, j] / heaviest
        if share < 0.04:
            break
        axes.add_patch(
            FancyArrowPatch(
                (x[j], y[j]),
                (x[i], y[i]),
                arrowstyle="-" if symmetric else "-|>,head_length=3.5,head_width=2",
                connectionstyle=f"arc3,rad={0 if symmetric else 0.14}",
                shrinkA=9,
                shrinkB=10,
                linewidth=0.4 + 4.2 * share,
                color=SERIES[0],
                alpha=0.25 + 0.6 * share,
            )
        )
    size = 300 if n <= 16 else 120
    axes.scatter(x, y, s=size, facecolor=PAPER, edgecolor=INK, linewidth=0.6 + 2.4 * np.diag(weights), zorder=3)
    for e in range(n):
        axes.text(x[e], y[e], str(e), ha="center", va="center", fontsize=9 if n <= 16 else 6, zorder=4)
    axes.set(xlim=(-1.22, 1.22), ylim=(-1.22, 1.22), aspect="equal")
    axes.axis("off")


def _line(axes: Axes, one: Series, *, every: int = 1) -> None:
    k = one.style % len(SERIES)
    axes.plot(
        np.asarray(one.x, dtype=float),
        _floats(one.y),
        color=SERIES[k],
        marker=_MARKERS[k],
        markevery=every,
        linestyle=_LINES[k],
    )


def _panel(draw: Any, *, title: str, alt: str, size: tuple[float, float] = (3.5, 2.5), bare: bool = False) -> str:
    """Draws one pair of axes and returns a ``<figure>``; ``bare`` ones have no ticks or labels."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure: Figure = Figure(figsize=size)
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        # Fixed margins: matplotlib's layout engines draw every figure twice.
        left, bottom = (0.02, 0.01) if bare else (0.185, 0.19)
        figure.subplots_adjust(left=left, right=0.98, bottom=bottom, top=0.9)
        axes.set_title(title)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        draw(axes)
        return f'<figure class="panel">{_inline_svg(figure, alt)}</figure>'


def _inline_svg(figure: Figure, alt: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"(font:[^;\"]*?\d+(?:\.\d+)?px) [^;\"]*", r"\1 var(--font)", text)
    # Ids must be unique on the page; matplotlib counts from 1 in every figure.
    prefix = "f" + hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(r'\bid="([^"]*)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'href="#([^"]*)"', rf'href="#{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]*)\)", rf"url(#{prefix}-\1)", text)
    for color, name in _VARIABLES.items():
        text = text.replace(color, f"var(--{name},{color})")
    text = re.sub(r"\n\s*", "\n", text)
    label = html.escape(alt, quote=True)
    return re.sub(
        r'<svg\b[^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', text, count=1
    )


def _thinned(x: Sequence[float], y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    steps, values = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(steps) <= _MAX_POINTS:
        return steps, values
    blocks = np.array_split(np.arange(len(steps)), _MAX_POINTS)
    return np.array([steps[b].mean() for b in blocks]), np.array([values[b].mean() for b in blocks])


def _mean_line(lines: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[list[float], list[float]]:
    by_step: dict[float, list[float]] = {}
    for x, y in lines:
        for step, value in zip(x, y, strict=True):
            by_step.setdefault(step, []).append(value)
    steps = sorted(step for step, values in by_step.items() if len(values) == len(lines))
    return steps, [float(np.mean(by_step[step])) for step in steps]


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"
