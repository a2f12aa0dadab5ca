"""How the routers of a model are drawn on a terminal: a row per layer, at most eight.

E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import ROUNDED
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from symphony_vlm.training.router_watch import LayerRouting

__all__ = ["load_bars", "router_line", "router_panel"]

MAX_ROWS = 8
BARS = "▁▂▃▄▅▆▇█"
WITH_DRIFT, WITH_EDGE = 64, 76
"""Columns from which there is room for the graph's drift, and for its heaviest edge."""


def load_bars(shares: Sequence[float], width: int) -> Text:
    """A bar per expert: half of full height is an even load, full height twice that or more, a red dot no token.

    Of more experts than there is room for, neighbours share a bar, which is that of the most loaded of them.
    """
    even = sum(shares) / len(shares)
    group = -(-len(shares) // width)
    bars = Text()
    for start in range(0, len(shares), group):
        load = max(shares[start : start + group]) / even
        if load == 0:
            bars.append("·", style="red")
        else:
            height = min(len(BARS), max(1, round(load * len(BARS) / 2)))
            bars.append(BARS[height - 1], style="cyan" if load < 2 else "yellow")
    return bars


def router_panel(layers: Sequence[LayerRouting], width: int) -> Panel:
    """Layers in their order; of many, those with the most loaded experts, and the others in one row.

    Args:
        layers: what to draw.
        width: columns that there are.
    """
    shown, others = _selected(layers)
    has_graph = any(layer.drift is not None for layer in layers)
    drift, edge = has_graph and width >= WITH_DRIFT, has_graph and width >= WITH_EDGE
    table = Table(box=None, padding=(0, 1), header_style="dim")
    bar_width = max(8, width - (66 if edge else 56 if drift else 40))
    table.add_column("layer", no_wrap=True, min_width=7)
    table.add_column("load by expert", no_wrap=True)
    # Wide enough for anything that may come, so that the panel does not change its width.
    table.add_column("largest", justify="right", no_wrap=True, min_width=8)
    table.add_column("entropy", justify="right", no_wrap=True, min_width=9)
    if drift:
        table.add_column("drift", justify="right", no_wrap=True)
    if edge:
        table.add_column("edge", justify="right", no_wrap=True)
    for layer in shown:
        bad = layer.is_collapsed
        row = [Text(_short(layer.name), style="bold red" if bad else ""), load_bars(layer.shares, bar_width)]
        row += [Text(f"{layer.largest:.0%}", style="bold red" if bad else ""), Text(f"{layer.entropy:.2f}")]
        row += [Text("" if layer.drift is None else f"{layer.drift:.1e}")] * drift
        row += [Text("" if layer.edge is None else f"{layer.edge[1]}→{layer.edge[0]} {layer.edge[2]:.2f}")] * edge
        table.add_row(*row)
    if others:
        row = [Text(f"{len(others)} more", style="dim"), Text("")]
        row += [Text(_range([o.largest for o in others], "{:.0%}"), style="dim")]
        row += [Text(_range([o.entropy for o in others], "{:.2f}"), style="dim")]
        table.add_row(*row)
    return Panel.fit(table, title="routers", title_align="left", box=ROUNDED, border_style="dim", padding=0)


def router_line(layers: Sequence[LayerRouting]) -> str:
    """The same in one line of plain text."""
    worst = max(layers, key=lambda layer: layer.largest)
    line = f"routers: largest share {worst.largest:.0%} ({worst.name})"
    line += f"  entropy {_range([layer.entropy for layer in layers], '{:.2f}')}"
    drifts = [layer.drift for layer in layers if layer.drift is not None]
    return f"{line}  drift {_range(drifts, '{:.1e}')}" if drifts else line


def _selected(layers: Sequence[LayerRouting]) -> tuple[list[LayerRouting], list[LayerRouting]]:
    if len(layers) <= MAX_ROWS:
        return list(layers), []
    by_load = sorted(range(len(layers)), key=lambda index: layers[index].largest, reverse=True)
    chosen = set(by_load[: MAX_ROWS - 1])
    return [layers[i] for i in sorted(chosen)], [layers[i] for i in range(len(layers)) if i not in chosen]


def _short(name: str) -> str:
    """``decoder layer 3`` is ``3``; ``vision layer 3`` is ``vision 3``."""
    return name.replace("decoder layer ", "").replace(" layer", "")


def _range(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}-{high}"
