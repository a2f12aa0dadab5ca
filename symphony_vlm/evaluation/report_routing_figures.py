"""Drawings of the report's section about routers, as inline SVG: maps of layers and maps of patches."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["layer_map", "patch_card"]

_CELL, _ROW = 44, 22
_LEFT, _TOP, _RIGHT = 46, 92, 72  # the last name leans over the right edge
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")


def layer_map(
    *,
    title: str,
    layers: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    top: float,
) -> str:
    """A map with a row a layer and a column a corruption; the number stands in each cell of up to 16 layers.

    Args:
        title: of the map.
        layers: their names.
        columns: names of the corruptions.
        values: of each layer and corruption; None stays empty.
        top: the value with the strongest colour.
    """
    row_height = _ROW if len(layers) <= 16 else 9
    width, height = _LEFT + _CELL * len(columns) + _RIGHT, _TOP + row_height * len(layers) + 8
    parts = [f'<text x="0" y="12" font-size="12.5" fill="var(--ink)">{html.escape(title)}</text>']
    for column, name in enumerate(columns):
        x, y = _LEFT + _CELL * (column + 0.5) + 3, _TOP - 6
        parts.append(
            f'<text transform="translate({x:.1f} {y}) rotate(-40)" font-size="10.5" fill="var(--muted)">'
            f"{html.escape(name.replace('_', ' '))}</text>"
        )
    for row, layer in enumerate(layers):
        y = _TOP + row_height * row
        if len(layers) <= 16 or row % 4 == 0:
            parts.append(
                f'<text x="{_LEFT - 6}" y="{y + row_height / 2 + 4:.1f}" font-size="10.5" text-anchor="end" '
                f'fill="var(--muted)">{html.escape(layer)}</text>'
            )
        for column, value in enumerate(values[row]):
            if value is not None:
                parts.append(_cell(_LEFT + _CELL * column, y, row_height, value, top))
    parts.append(f'<text x="0" y="{_TOP - 6}" font-size="10.5" fill="var(--muted)">layer</text>')
    largest = max((value for line in values for value in line if value is not None), default=0.0)
    alt = html.escape(
        f"{title}: {len(layers)} layers and {len(columns)} corruptions, at most {largest:.3g}", quote=True
    )
    style = f"font-family:var(--font);max-width:{width}px;min-width:{0.8 * width:.0f}px"
    return (
        f'<figure class="panel"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{alt}" style="{style}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _cell(x: float, y: float, height: float, value: float, top: float) -> str:
    # One hue from paper to full: its lightness alone tells the value, to any eye and in print.
    share = min(1.0, value / top)
    rect = (
        f'<rect x="{x}" y="{y}" width="{_CELL - 1.5}" height="{height - 1.5}" rx="2" '
        f'style="fill:color-mix(in srgb,var(--s0) {8 + 72 * share:.0f}%,var(--card))"/>'
    )
    if height < _ROW:
        return rect
    # Dark ink on light cells and the paper's colour on dark ones, in either theme.
    ink = "card" if share > 0.75 else "ink"
    middle = x + (_CELL - 1.5) / 2
    return rect + (
        f'<text x="{middle:.1f}" y="{y + height / 2 + 3:.1f}" font-size="10.5" text-anchor="middle" '
        f'fill="var(--{ink})">{value:.1f}</text>'
    )


def patch_card(sample: Mapping[str, Any]) -> str:
    """A sample's question and answers, its clean picture, and the corrupted one with the changed patches over it."""
    changed = [float(share) for share in sample["changed"]]
    grid = int(sample["grid"])
    clean, corrupted = (_picture(sample[name]) for name in ("clean_png", "corrupted_png"))
    patches = "".join(
        f'<rect x="{100 / grid * (n % grid):.3f}" y="{100 / grid * (n // grid):.3f}" width="{100 / grid:.3f}" '
        f'height="{100 / grid:.3f}" style="fill:#d55e00" fill-opacity="{0.85 * share:.3f}"/>'
        for n, share in enumerate(changed)
        if share > 0
    )
    mean = 100 * sum(changed) / len(changed)
    alt = f"{mean:.0f} % of the experts of {grid} x {grid} patches differ"
    cell = f"{str(sample['corruption']).replace('_', ' ')}, severity {int(sample['severity'])}"
    said = f"{_said(sample['clean'], sample['clean_score'])} → {_said(sample['corrupted'], sample['corrupted_score'])}"
    style = "width:32%;min-width:96px;image-rendering:pixelated;border-radius:4px"
    return (
        f'<article class="sample"><p class="sub">{html.escape(cell)} · {html.escape(str(sample["item_id"]))}</p>'
        f"<p>{html.escape(str(sample['question']))}</p><p>{said}</p>"
        '<p style="display:flex;gap:6px;flex-wrap:wrap">'
        f'<svg viewBox="0 0 100 100" role="img" aria-label="clean" style="{style}">{clean}</svg>'
        f'<svg viewBox="0 0 100 100" role="img" aria-label="corrupted" style="{style}">{corrupted}</svg>'
        f'<svg viewBox="0 0 100 100" role="img" aria-label="{html.escape(alt, quote=True)}" style="{style}">'
        f'<g style="filter:grayscale(1)">{corrupted}</g>{patches}</svg></p>'
        f'<p class="sub">Experts changed: {mean:.0f} %</p></article>'
    )


def _picture(base64_png: Any) -> str:
    text = str(base64_png)
    assert _BASE64.fullmatch(text), "the picture of a sample is not base64"
    return f'<image href="data:image/png;base64,{text}" width="100" height="100"/>'


def _said(prediction: Any, score: float | None) -> str:
    mark, kind = ("✓ right", "right") if (score or 0) >= 0.5 else ("✗ wrong", "wrong")
    text = html.escape(str(prediction or "").strip() or "(empty)")
    return f'{text} <span class="mark {kind}">{mark}</span>'
