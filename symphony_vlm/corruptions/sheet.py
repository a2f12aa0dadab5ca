"""One picture of a picture's corruptions: a row a corruption, severities from left to right, families together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from symphony_vlm.corruptions.catalogue import CORRUPTIONS, corrupt, parse_corruptions
from symphony_vlm.corruptions.operators import UInt8Image
from symphony_vlm.corruptions.randomness import corruption_rng, require_rgb8

__all__ = ["draw_sheet"]

SEVERITIES = (1, 2, 3, 4, 5)
_PAPER, _INK, _MUTED, _RULE = "#ffffff", "#111213", "#5c5d5e", "#c9cacb"
_GAP = 4
"""Pixels between the pictures of a row, and between rows."""
_MARGIN = 16
_PANEL_GAP = 28
_ROWS_OF_ONE_PANEL = 6
"""More rows than this stand in two panels side by side."""
_FAMILIES = ("noise", "blur", "weather", "digital")


@dataclass(frozen=True)
class _Block:
    """A heading and the rows below it."""

    heading: str
    names: tuple[str, ...]


def draw_sheet(image: UInt8Image, names: Sequence[str], *, key: str, seed: int = 0, title: str = "") -> Image.Image:
    """Draws the clean picture and every corruption of it at severities 1 to 5, pixel for pixel.

    Args:
        image: uint8 ``[H, W, 3]``, RGB. Corruptions are applied at this size, and it is the size of a cell.
        names: Keys of `CORRUPTIONS`; families are put together, within them the order stays.
        key: From `image_key`, of the generators.
        seed: Of the generators.
        title: Stands beside the clean picture.

    Returns:
        RGB.

    Raises:
        InputError: See `corrupt`.
    """
    height, width = require_rgb8(image).shape[:2]
    names = parse_corruptions(",".join(names))
    text = _Text(min(max(height, width) // 9, 26))
    panels = _panels(_blocks(names))
    label_width = max(text.width(name) for name in ("clean", *names)) + 10
    panel_width = label_width + len(SEVERITIES) * (width + _GAP)
    cell_height = max(height, text.line) + _GAP
    panel_heights = [
        sum(text.above(block.heading) + cell_height * len(block.names) for block in panel) for panel in panels
    ]
    size = (
        2 * _MARGIN + panel_width * len(panels) + _PANEL_GAP * (len(panels) - 1),
        2 * _MARGIN + max(panel_heights),
    )
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, panel in enumerate(panels):
        left, top = _MARGIN + number * (panel_width + _PANEL_GAP), _MARGIN
        for block in panel:
            _draw_heading(draw, text, block.heading, left, top, label_width, width, panel_width)
            top += text.above(block.heading)
            for name in block.names:
                text.name(draw, name, left + label_width - 10, top + height // 2)
                if name == "clean":
                    sheet.paste(Image.fromarray(image), (left + label_width, top))
                    text.note(draw, title, left + label_width + width + 12, top, panel_width - label_width - width - 12)
                else:
                    for column, severity in enumerate(SEVERITIES):
                        pixels = corrupt(image, name, severity, corruption_rng(key, name, severity, seed))
                        place = (left + label_width + column * (width + _GAP), top)
                        sheet.paste(Image.fromarray(np.asarray(pixels)), place)
                top += cell_height
    return sheet


def _blocks(names: Sequence[str]) -> list[_Block]:
    # sorted keeps the order within a family
    by_family = sorted(dict.fromkeys(names), key=lambda name: _FAMILIES.index(CORRUPTIONS[name].family))
    families = groupby(by_family, key=lambda name: CORRUPTIONS[name].family)
    return [_Block("", ("clean",)), *(_Block(family, tuple(listed)) for family, listed in families)]


def _panels(blocks: Sequence[_Block]) -> list[Sequence[_Block]]:
    """One column of blocks, or two of about the same height."""
    rows = [len(block.names) for block in blocks]
    if sum(rows) <= _ROWS_OF_ONE_PANEL or len(blocks) < 3:
        return [blocks]
    # The clean picture never stands alone.
    split = min(range(2, len(blocks)), key=lambda place: max(sum(rows[:place]), sum(rows[place:])))
    return [blocks[:split], blocks[split:]]


def _draw_heading(
    draw: ImageDraw.ImageDraw, text: _Text, heading: str, left: int, top: int, label: int, cell: int, panel: int
) -> None:
    """The family's name, a rule, and the severities over their columns."""
    if not heading:
        return
    bottom = top + text.heading - 6
    draw.line((left, bottom, left + panel - _GAP, bottom), fill=_RULE)
    draw.text((left, bottom - 4), heading, fill=_INK, font=text.large, anchor="ls")
    for column, severity in enumerate(SEVERITIES):
        middle = left + label + column * (cell + _GAP) + cell // 2
        draw.text((middle, bottom - 4), str(severity), fill=_MUTED, font=text.small, anchor="ms")


class _Text:
    """Fonts of one size, and what is written with them.

    Pillow's own font: the same on every machine.
    """

    def __init__(self, size: int) -> None:
        size = max(size, 12)
        self.small = ImageFont.load_default(size)
        self.large = ImageFont.load_default(size + 4)
        self.line = round(1.4 * size)
        self.heading = 2 * size + 14

    def above(self, heading: str) -> int:
        return self.heading if heading else 0

    def width(self, text: str) -> int:
        return round(self.small.getlength(text))

    def name(self, draw: ImageDraw.ImageDraw, name: str, right: int, middle: int) -> None:
        draw.text((right, middle), name, fill=_INK, font=self.small, anchor="rm")

    def note(self, draw: ImageDraw.ImageDraw, text: str, left: int, top: int, width: int) -> None:
        """The lines of a text, each cut to the width."""
        for number, line in enumerate(text.splitlines()):
            while line and self.width(line) > width:
                line = line[:-2].rstrip() + "\N{HORIZONTAL ELLIPSIS}" if len(line) > 2 else ""
            draw.text((left, top + number * self.line), line, fill=_MUTED, font=self.small)
