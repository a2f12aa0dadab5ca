"""Draws what `routing_view` found as HTML and SVG: patches over the picture, words in colours, the expert graph.

Text goes through `html.escape`; the drawings hold no script and load nothing. Every colour comes with its expert's
number, since nobody can tell more than eight colours apart, and some people fewer.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence

import torch
from PIL import Image

from symphony_vlm.serving.patch_geometry import Region
from symphony_vlm.serving.routing_view import LayerRouting, PatchGrid, RoutingView, Word

__all__ = ["expert_color", "graph_svg", "legend_html", "overlay_svg", "strongest_edges", "words_html"]

PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8a8f98")
"""Okabe and Ito's, grey for black. From the ninth expert on they repeat."""

MAX_WORDS = 600
"""Of a longer conversation the end is shown."""

_PICTURE_SIDE = 512
_GRAPH_SIDE = 320
_MIN_WEIGHT = 5e-4
"""Edges below half a per mille are not drawn: they are the rounding of a graph that has not moved."""


def expert_color(expert: int) -> str:
    """Colour of an expert, the same everywhere."""
    return PALETTE[expert % len(PALETTE)]


def overlay_svg(picture: Image.Image, region: Region, grid: PatchGrid, layer: LayerRouting) -> str:
    """A picture with each patch in the colour of the expert with the largest weight there.

    Args:
        picture: as uploaded, RGB.
        region: what of it the encoder's square shows (`seen_region`).
        grid: where its patches stand.
        layer: whose decisions.
    """
    small = picture.copy()
    small.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    width, height = small.size
    scale_x, scale_y = width / picture.width, height / picture.height
    left, top = region[0] * scale_x, region[1] * scale_y
    step_x = (region[2] - region[0]) * scale_x / grid.side
    step_y = (region[3] - region[1]) * scale_y / grid.side
    marks = []
    for number, position in enumerate(grid.positions):
        row, column = divmod(number, grid.side)
        x0, x1 = (min(max(left + step_x * c, 0), width) for c in (column, column + 1))
        y0, y1 = (min(max(top + step_y * r, 0), height) for r in (row, row + 1))
        # A patch of padding lies outside of the picture.
        if x1 - x0 < 0.05 * step_x or y1 - y0 < 0.05 * step_y:
            continue
        experts = layer.indices_SK[position].tolist()
        title = f"patch {row + 1}, {column + 1}: {_share_text(layer.shares([position]))}"
        marks.append(
            f'<rect x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}" '
            f'fill="{expert_color(experts[0])}"><title>{title}</title></rect>'
        )
        if min(step_x, step_y) >= 18:
            size = min(step_x, step_y) * 0.34
            marks.append(
                f'<text x="{(x0 + x1) / 2:.1f}" y="{(y0 + y1) / 2:.1f}" font-size="{size:.1f}">{experts[0]}</text>'
            )
    return (
        f'<svg class="patches" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="The picture with the expert of each patch">'
        f'<image href="{_data_url(small)}" width="{width}" height="{height}"/><g>{"".join(marks)}</g></svg>'
    )


def words_html(view: RoutingView, layer: LayerRouting) -> str:
    """The conversation, each word in the colour of the expert with the largest share in its tokens."""
    words = view.words[-MAX_WORDS:]
    lines = []
    for is_answer, run in _runs(words):
        spans = "".join(_word_html(word, layer) for word in run)
        speaker = "Answer" if is_answer else "Prompt"
        lines.append(f'<p class="{speaker.lower()}"><b>{speaker}</b>{spans}</p>')
    omitted = len(view.words) - len(words)
    note = f'<p class="note">The first {omitted:,} words are left out.</p>' if omitted else ""
    return f'<div class="words">{note}{"".join(lines)}</div>'


def legend_html(view: RoutingView, layer: LayerRouting) -> str:
    """The experts with their colours and how much they contributed to patches and words."""
    patches = [position for grid in view.pictures for position in grid.positions]
    words = [position for word in view.words for position in range(word.start, word.stop)]
    columns = [(name, layer.shares(places)) for name, places in (("patches", patches), ("words", words)) if places]
    head = "".join(f"<th>{name}</th>" for name, _ in columns)
    rows = "".join(
        f'<tr><td><i style="background:{expert_color(expert)}"></i>{expert}</td>'
        + "".join(f"<td>{float(shares_E[expert]):.0%}</td>" for _, shares_E in columns)
        + "</tr>"
        for expert in range(layer.num_experts)
    )
    return f'<table class="legend"><tr><th>expert</th>{head}</tr>{rows}</table>'


def strongest_edges(adjacency_EE: torch.Tensor, most: int) -> list[tuple[int, int, float]]:
    """The heaviest entries off the diagonal as (listening expert, expert listened to, weight), heaviest first."""
    size = len(adjacency_EE)
    edges = [(j, k, float(adjacency_EE[j, k])) for j in range(size) for k in range(size) if j != k]
    # Sorted by place where weights are equal, so that a drawing never depends on anything else.
    return sorted((e for e in edges if e[2] > _MIN_WEIGHT), key=lambda edge: (-edge[2], edge[0], edge[1]))[:most]


def graph_svg(layer: LayerRouting) -> str:
    """The experts on a circle with the strongest edges of their graph, as wide as they are heavy.

    Raises:
        ValueError: the layer has no graph.
    """
    if layer.adjacency_EE is None:
        raise ValueError("a plain router has no expert graph")
    size = layer.num_experts
    centre, radius = _GRAPH_SIDE / 2, _GRAPH_SIDE / 2 - 30
    angles = [2 * math.pi * expert / size - math.pi / 2 for expert in range(size)]
    places = [(centre + radius * math.cos(a), centre + radius * math.sin(a)) for a in angles]
    edges = strongest_edges(layer.adjacency_EE, most=3 * size)
    top = edges[0][2] if edges else 1.0
    lines = [
        _edge_svg(places[giver], places[listener], weight / top, expert_color(giver), centre)
        + f"<title>expert {listener} listens to expert {giver}: {weight:.3f}</title></path>"
        # The heaviest last, on top of the others.
        for listener, giver, weight in reversed(edges)
    ]
    disc = min(16.0, 0.8 * math.pi * radius / size)
    nodes = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{disc:.1f}" fill="{expert_color(expert)}"/>'
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{max(disc * 0.85, 5):.1f}">{expert}</text>'
        for expert, (x, y) in enumerate(places)
    ]
    return (
        f'<svg class="graph" viewBox="0 0 {_GRAPH_SIDE} {_GRAPH_SIDE}" role="img" aria-label="Expert graph">'
        f"{''.join(lines)}{''.join(nodes)}</svg>"
    )


def _edge_svg(start: tuple[float, float], end: tuple[float, float], share: float, color: str, centre: float) -> str:
    """An open path from the giving to the listening expert, bent, so that both directions can be seen."""
    (x0, y0), (x1, y1) = start, end
    bend = 0.14
    x, y = (x0 + x1) / 2 - bend * (y1 - y0), (y0 + y1) / 2 + bend * (x1 - x0)
    # Towards the middle of the circle, away from the discs between the two.
    x, y = x + 0.25 * (centre - x), y + 0.25 * (centre - y)
    return (
        f'<path d="M{x0:.1f} {y0:.1f}Q{x:.1f} {y:.1f} {x1:.1f} {y1:.1f}" stroke="{color}" '
        f'stroke-width="{0.6 + 5.4 * share:.2f}" stroke-opacity="{0.35 + 0.5 * share:.2f}">'
    )


def _word_html(word: Word, layer: LayerRouting) -> str:
    shares_E = layer.shares(range(word.start, word.stop))
    expert = int(shares_E.argmax())
    blank = word.text[: len(word.text) - len(word.text.lstrip())]
    # A line feed alone, as behind a picture, would be an empty box.
    shown = html.escape(word.text.strip()) or "↵"
    blank = "" if not word.text.strip() else html.escape(blank)
    return (
        f'{blank}<span style="--expert:{expert_color(expert)}" title="{_share_text(shares_E)}">'
        # Joined, so that no line ends between a word and its number.
        f"{shown}&#8288;<sub>{expert}</sub></span>"
    )


def _runs(words: Sequence[Word]) -> list[tuple[bool, list[Word]]]:
    """Words of the prompt and of the answers in turn."""
    runs: list[tuple[bool, list[Word]]] = []
    for word in words:
        if not runs or runs[-1][0] != word.is_answer:
            runs.append((word.is_answer, []))
        runs[-1][1].append(word)
    return runs


def _share_text(shares_E: torch.Tensor) -> str:
    """The experts that took part, the largest share first, three at most."""
    order = torch.sort(shares_E, descending=True, stable=True).indices.tolist()
    return ", ".join(f"expert {expert} {float(shares_E[expert]):.0%}" for expert in order[:3] if shares_E[expert] > 0)


def _data_url(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
