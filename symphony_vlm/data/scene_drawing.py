"""What a generated scene is, and how it is drawn.

A scene holds up to three items, each in a cell half as wide and half as high as the picture. Cells of one scene never
overlap, so neither do the items. Everything that is drawn is stored in the scene; drawing uses no random state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw

__all__ = [
    "COLORS",
    "HELD_OUT_PAIRS",
    "POSITIONS",
    "SHAPES",
    "SIZES",
    "TEXTURES",
    "Background",
    "Scene",
    "SceneNumber",
    "SceneObject",
    "draw_scene",
]

Rgb = tuple[int, int, int]
Point = tuple[float, float]

SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")

COLORS: dict[str, Rgb] = {
    "red": (214, 36, 42),
    "green": (30, 150, 56),
    "blue": (36, 84, 226),
    "yellow": (252, 222, 38),
    "purple": (142, 46, 188),
    "orange": (250, 132, 18),
    "white": (250, 250, 250),
    "black": (22, 22, 26),
}

SECOND_COLORS: dict[str, Rgb] = {
    "red": (255, 168, 160),
    "green": (158, 234, 158),
    "blue": (158, 194, 255),
    "yellow": (168, 128, 0),
    "purple": (226, 168, 250),
    "orange": (142, 62, 0),
    "white": (150, 150, 156),
    "black": (112, 112, 118),
}
"""The second tone of a texture: light on dark colours and dark on light ones, never another colour of the palette."""

HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"),
        ("green", "circle"),
        ("blue", "triangle"),
        ("yellow", "square"),
        ("purple", "star"),
        ("orange", "triangle"),
        ("white", "circle"),
        ("black", "square"),
    }
)
"""Colour and shape pairs that the training split never shows: one per colour, at least one per shape."""

POSITIONS: dict[str, tuple[int, int]] = {
    "top left": (0, 0),
    "top": (1, 0),
    "top right": (2, 0),
    "left": (0, 1),
    "center": (1, 1),
    "right": (2, 1),
    "bottom left": (0, 2),
    "bottom": (1, 2),
    "bottom right": (2, 2),
}
"""Column and row of each cell, in quarters of the picture; a cell is two quarters wide and high."""

SUPERSAMPLING = 4
RADII = {"small": 0.33, "large": 0.45}
STROKE = 0.035
MAX_JITTER = 0.03
"""Lengths in cell widths, such that a large shape at the farthest offset still fits into its cell."""

TILE_FILL: Rgb = (255, 241, 210)
TILE_INK: Rgb = (44, 36, 84)

GLYPHS: dict[int, tuple[tuple[Point, ...], ...]] = {
    0: (((1, 0), (3, 0), (4, 1), (4, 5), (3, 6), (1, 6), (0, 5), (0, 1), (1, 0)),),
    1: (((0.7, 1.3), (2.2, 0), (2.2, 6)), ((0.8, 6), (3.6, 6))),
    2: (((0, 1.3), (0.4, 0.5), (1.2, 0), (2.9, 0), (3.8, 0.7), (3.8, 2), (0, 6), (4, 6)),),
    3: (
        ((0, 0.8), (1, 0), (3, 0), (3.9, 0.9), (3.9, 2), (3, 2.9), (1.6, 2.9)),
        ((3, 2.9), (4, 3.9), (4, 5), (3, 6), (1, 6), (0, 5.2)),
    ),
    4: (((3, 6), (3, 0), (0, 4.2), (4.2, 4.2)),),
    5: (((3.8, 0), (0.4, 0), (0.1, 2.8), (1, 2.4), (3, 2.4), (4, 3.4), (4, 5), (3, 6), (1, 6), (0, 5.2)),),
    6: (((3.8, 0.7), (3, 0), (1, 0), (0, 1), (0, 5), (1, 6), (3, 6), (4, 5), (4, 3.7), (3, 2.8), (1, 2.8), (0, 3.7)),),
    7: (((0, 0), (4, 0), (1.5, 6)),),
    8: (
        ((1, 0), (3, 0), (3.8, 0.8), (3.8, 2), (3, 2.8), (1, 2.8), (0.2, 2), (0.2, 0.8), (1, 0)),
        ((1, 2.8), (3, 2.8), (4, 3.8), (4, 5), (3, 6), (1, 6), (0, 5), (0, 3.8), (1, 2.8)),
    ),
    9: (((0.2, 5.3), (1, 6), (3, 6), (4, 5), (4, 1), (3, 0), (1, 0), (0, 1), (0, 2.3), (1, 3.2), (3, 3.2), (4, 2.3)),),
}
"""Digits as strokes on a field 4 wide and 6 high; our own, because system fonts differ between machines."""


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """A shape in a scene.

    Args:
        shape: One of ``SHAPES``.
        color: One of ``COLORS``.
        size: One of ``SIZES``.
        texture: One of ``TEXTURES``.
        position: One of ``POSITIONS``.
        jitter: Offset from the middle of the cell, x and y, in cell widths.
        angle: Rotation in degrees.
    """

    shape: str
    color: str
    size: str
    texture: str
    position: str
    jitter: Point = (0.0, 0.0)
    angle: int = 0


@dataclass(frozen=True, kw_only=True)
class SceneNumber:
    """A digit in a scene; it is not one of the shapes, and questions about shapes leave it out.

    Args:
        value: The digit, 0 to 9.
        position: One of ``POSITIONS``.
        jitter: Offset from the middle of the cell, x and y, in cell widths.
        tile: Whether the digit stands on a tile; a bare digit has a light rim instead.
    """

    value: int
    position: str
    jitter: Point = (0.0, 0.0)
    tile: bool = True


@dataclass(frozen=True, kw_only=True)
class Background:
    """What is behind the items: ``first`` alone (flat) or between two muted tones.

    Args:
        kind: ``"flat"``, ``"gradient"``, ``"noise"`` or ``"stripes"``.
        first: One tone.
        second: The other tone.
        seed: Fixes direction, phase and noise.
    """

    kind: str
    first: Rgb
    second: Rgb
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Up to three items in the order in which the caption names them, and a background."""

    items: tuple[SceneObject | SceneNumber, ...]
    background: Background

    @cached_property
    def objects(self) -> tuple[SceneObject, ...]:
        """The shapes, without the number."""
        return tuple(item for item in self.items if isinstance(item, SceneObject))

    @cached_property
    def number(self) -> SceneNumber | None:
        """The number, if the scene shows one."""
        return next((item for item in self.items if isinstance(item, SceneNumber)), None)

    @property
    def held_out(self) -> bool:
        """Whether a shape has a colour that no training scene gives it."""
        return any((item.color, item.shape) in HELD_OUT_PAIRS for item in self.objects)


def draw_scene(scene: Scene, image_size: int) -> Image.Image:
    """Draws a scene.

    Args:
        scene: What to draw.
        image_size: Width and height in pixels.

    Returns:
        An RGB image.
    """
    image = _draw_background(scene.background, image_size)
    cell = image_size // 2
    for item in scene.items:
        column, row = POSITIONS[item.position]
        corner = ((image_size - cell) * column // 2, (image_size - cell) * row // 2)
        color, mask = _draw_object(item, cell) if isinstance(item, SceneObject) else _draw_number(item, cell)
        # Reduced one by one: an item covers a quarter of the picture, so this is faster than one large canvas.
        image.paste(color.reduce(SUPERSAMPLING), corner, mask.reduce(SUPERSAMPLING))
    return image


def _draw_background(background: Background, size: int) -> Image.Image:
    if background.kind == "flat":
        return Image.new("RGB", (size, size), background.first)
    mix_HW = _background_mix(background, size)
    first, second = np.array(background.first), np.array(background.second)
    # Integers throughout: floating point may round differently on another machine and change the file.
    pixels_HWC = (first * (255 - mix_HW[..., None]) + second * mix_HW[..., None]) // 255
    return Image.fromarray(pixels_HWC.astype(np.uint8))


def _background_mix(background: Background, size: int) -> np.ndarray:
    """Returns how much of the second tone each pixel has, 0 to 255, with shape ``(size, size)``."""
    rng = np.random.default_rng(background.seed)
    if background.kind == "noise":
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8))
        soft: np.ndarray = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(np.int64)
        return np.clip(soft + rng.integers(-24, 25, (size, size)), 0, 255)
    steps_x, steps_y = ((1, 0), (0, 1), (1, 1), (-1, 1))[rng.integers(4)]
    x = np.arange(size)[None, :] if steps_x >= 0 else np.arange(size)[::-1][None, :]
    ramp = abs(steps_x) * x + steps_y * np.arange(size)[:, None]
    if background.kind == "gradient":
        mix: np.ndarray = ramp * 255 // int(ramp.max())
    else:
        period = size * int(rng.integers(14, 26)) // 64
        phase = (ramp + int(rng.integers(period))) % period
        mix = np.abs(2 * phase - period) * 255 // period
    return mix


def _draw_object(item: SceneObject, cell: int) -> tuple[Image.Image, Image.Image]:
    """Returns the colours and the coverage of a shape, each ``SUPERSAMPLING`` times the cell."""
    side = cell * SUPERSAMPLING
    radius = RADII[item.size] * side
    center = (side * (0.5 + item.jitter[0]), side * (0.5 + item.jitter[1]))
    rim = tuple(channel * 11 // 20 for channel in COLORS[item.color])
    color = _draw_texture(item, side, center, radius)
    mask = Image.new("L", (side, side), 0)
    color_pen, mask_pen = ImageDraw.Draw(color), ImageDraw.Draw(mask)
    stroke = round(STROKE * side)
    if item.shape == "circle":
        outer = _circle_box(center, radius)
        mask_pen.ellipse(outer, fill=255)
        color_pen.ellipse(outer, outline=rim, width=stroke)
    else:
        corners = _outline(item.shape, center, radius, item.angle)
        mask_pen.polygon(corners, fill=255)
        # The rim is centred on the edge and the mask cuts its outer half off.
        color_pen.line([*corners, *corners[:2]], fill=rim, width=2 * stroke, joint="curve")
    return color, mask


def _draw_texture(item: SceneObject, side: int, center: Point, radius: float) -> Image.Image:
    first, second = COLORS[item.color], SECOND_COLORS[item.color]
    image = Image.new("RGB", (side, side), first)
    pen = ImageDraw.Draw(image)
    pitch = side * (0.15 if item.size == "small" else 0.18)
    reach = int(radius / pitch) + 2
    steps = range(-reach, reach + 1)
    if item.texture == "striped":
        for step in steps:
            middle = center[1] + step * pitch
            pen.line([(0, round(middle - side * 0.5)), (side, round(middle + side * 0.5))], second, round(pitch * 0.36))
    elif item.texture == "dotted":
        for row in steps:
            for column in steps:
                spot = (center[0] + (column + row % 2 / 2) * pitch, center[1] + row * pitch * 0.87)
                pen.ellipse(_circle_box(spot, pitch * 0.3), fill=second)
    return image


def _outline(shape: str, center: Point, radius: float, angle: int) -> list[tuple[int, int]]:
    """Returns the corners of a polygon, in whole supersampled pixels."""
    unit: list[Point]
    if shape == "square":
        unit = [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]
    elif shape == "triangle":
        unit = [(0.0, -0.9), (0.91, 0.7), (-0.91, 0.7)]
    else:
        unit = [_turn((0.0, -1.0 if tip % 2 == 0 else -0.46), 36 * tip) for tip in range(10)]
    turned = [_turn(point, angle) for point in unit]
    return [(round(center[0] + radius * x), round(center[1] + radius * y)) for x, y in turned]


def _draw_number(item: SceneNumber, cell: int) -> tuple[Image.Image, Image.Image]:
    side = cell * SUPERSAMPLING
    center = (side * (0.5 + item.jitter[0]), side * (0.5 + item.jitter[1]))
    unit = side * (0.098 if item.tile else 0.11)
    strokes = [
        [(center[0] + (x - 2) * unit, center[1] + (y - 3) * unit) for x, y in line] for line in GLYPHS[item.value]
    ]
    color = Image.new("RGB", (side, side), TILE_FILL)
    mask = Image.new("L", (side, side), 0)
    color_pen, mask_pen = ImageDraw.Draw(color), ImageDraw.Draw(mask)
    if item.tile:
        box = _circle_box(center, side * 0.43)
        mask_pen.rounded_rectangle(box, radius=round(side * 0.12), fill=255)
        color_pen.rounded_rectangle(box, radius=round(side * 0.12), outline=TILE_INK, width=round(STROKE * side))
    else:
        _draw_strokes(mask_pen, strokes, 255, round(unit * 2.2))
    _draw_strokes(color_pen, strokes, TILE_INK, round(unit * (1.0 if item.tile else 1.2)))
    return color, mask


def _draw_strokes(pen: ImageDraw.ImageDraw, strokes: list[list[Point]], fill: int | Rgb, width: int) -> None:
    for line in strokes:
        points = [(round(x), round(y)) for x, y in line]
        pen.line(points, fill=fill, width=width, joint="curve")
        for end in (points[0], points[-1]):
            pen.ellipse(_circle_box(end, width / 2), fill=fill)


def _circle_box(center: Point, radius: float) -> tuple[int, int, int, int]:
    x, y = center
    return round(x - radius), round(y - radius), round(x + radius), round(y + radius)


def _turn(point: Point, degrees: int) -> Point:
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return point[0] * cosine - point[1] * sine, point[0] * sine + point[1] * cosine
