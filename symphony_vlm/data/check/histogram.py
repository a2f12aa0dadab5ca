"""A histogram of lengths as SVG, with nothing but the page's own style."""

from __future__ import annotations

from array import array

import numpy as np

__all__ = ["histogram_svg"]

_WIDTH, _HEIGHT = 720, 230
_LEFT, _BOTTOM, _TOP = 56, 34, 14
_BINS = 40


def histogram_svg(values: array[int], unit: str, limit: int | None = None) -> str:
    """How many records have which length.

    The axis ends at the 99.5th percentile, so that one giant does not squeeze the rest into a line; what is longer is
    counted in the last bar. ``limit`` draws max_length.
    """
    numbers = np.frombuffer(values, dtype=np.dtype(values.typecode)).astype(np.int64)
    low, high = int(numbers.min()), int(np.percentile(numbers, 99.5, method="inverted_cdf"))
    # Whole numbers a bin, or bins would hold unequally many of them.
    step = max(1, -(-(high - low + 1) // _BINS))
    n_bins = max(1, -(-(high - low + 1) // step))
    counts = np.bincount(np.minimum((numbers - low) // step, n_bins - 1), minlength=n_bins)
    right, base = _WIDTH - 12, _HEIGHT - _BOTTOM
    scale_x = (right - _LEFT) / n_bins
    peak = int(counts.max())
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Histogram of record lengths in {unit}">',
        *(_grid_line(share, peak, base, right) for share in (0.0, 0.5, 1.0)),
    ]
    for number, count in enumerate(counts):
        first, last = low + number * step, low + (number + 1) * step - 1
        span = f"{first:,}" if step == 1 else f"{first:,} to {last:,}"
        if number == n_bins - 1 and int(numbers.max()) > last:
            span = f"{first:,} and more (longest {int(numbers.max()):,})"
        height = (base - _TOP) * int(count) / peak
        parts.append(
            f'<rect class="bar" x="{_LEFT + number * scale_x + 0.75:.1f}" y="{base - height:.1f}" '
            f'width="{max(scale_x - 1.5, 0.5):.1f}" height="{height:.1f}"><title>{span} {unit}: {int(count):,} '
            f"records</title></rect>"
        )
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = _LEFT + share * (right - _LEFT)
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{base + 16}" text-anchor="{anchor}">'
            f"{low + share * n_bins * step:,.0f}</text>"
        )
    parts.append(
        f'<text class="tick" x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">{unit}</text>'
    )
    if limit is not None and low <= limit < low + n_bins * step:
        at = _LEFT + (limit - low) / step * scale_x
        parts.append(
            f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{base}"/>'
            f'<text class="tick limit-text" x="{at - 4:.1f}" y="{_TOP + 8}" text-anchor="end">'
            f"max_length {limit:,}</text>"
        )
    return "".join([*parts, "</svg>"])


def _grid_line(share: float, peak: int, base: int, right: int) -> str:
    at = base - share * (base - _TOP)
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
        f'<text class="tick" x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{share * peak:,.0f}</text>'
    )
