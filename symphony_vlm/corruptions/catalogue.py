"""The table of corruptions, and the one function that applies any of them by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from symphony_vlm.corruptions import blur, digital, noise, weather
from symphony_vlm.corruptions.randomness import require_rgb8
from symphony_vlm.errors import InputError

__all__ = ["ALL", "COMMON", "CORRUPTIONS", "EXTRA", "Corruption", "corrupt", "parse_corruptions"]

Family = Literal["noise", "blur", "weather", "digital"]


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """One row of the table."""

    family: Family
    function: Callable[[NDArray[np.uint8], int, np.random.Generator], NDArray[np.uint8]]
    """``(image [H, W, 3], severity 1..5, generator) -> image``, arguments not checked; call `corrupt` instead."""
    common: bool = False
    """One of the fifteen over which ImageNet-C averages."""
    variant_of: str | None = None
    """The corruption that this is another version of; a variant is used only when named."""


CORRUPTIONS: MappingProxyType[str, Corruption] = MappingProxyType(
    {
        "gaussian_noise": Corruption(family="noise", function=noise.gaussian_noise, common=True),
        "shot_noise": Corruption(family="noise", function=noise.shot_noise, common=True),
        "impulse_noise": Corruption(family="noise", function=noise.impulse_noise, common=True),
        "defocus_blur": Corruption(family="blur", function=blur.defocus_blur, common=True),
        "glass_blur": Corruption(family="blur", function=blur.glass_blur, common=True),
        "motion_blur": Corruption(family="blur", function=blur.motion_blur, common=True),
        "zoom_blur": Corruption(family="blur", function=blur.zoom_blur, common=True),
        "snow": Corruption(family="weather", function=weather.snow, common=True),
        "frost": Corruption(family="weather", function=weather.frost, common=True),
        "fog": Corruption(family="weather", function=weather.fog, common=True),
        "brightness": Corruption(family="weather", function=weather.brightness, common=True),
        "contrast": Corruption(family="digital", function=digital.contrast, common=True),
        "elastic_transform": Corruption(family="digital", function=digital.elastic_transform, common=True),
        "pixelate": Corruption(family="digital", function=digital.pixelate, common=True),
        "jpeg_compression": Corruption(family="digital", function=digital.jpeg_compression, common=True),
        "speckle_noise": Corruption(family="noise", function=noise.speckle_noise),
        "gaussian_blur": Corruption(family="blur", function=blur.gaussian_blur),
        "spatter": Corruption(family="weather", function=weather.spatter),
        "saturate": Corruption(family="digital", function=digital.saturate),
        "frost_procedural": Corruption(family="weather", function=weather.frost_procedural, variant_of="frost"),
        "elastic_ic": Corruption(family="digital", function=digital.elastic_ic, variant_of="elastic_transform"),
    }
)

COMMON: tuple[str, ...] = tuple(name for name, row in CORRUPTIONS.items() if row.common)
EXTRA: tuple[str, ...] = tuple(name for name, row in CORRUPTIONS.items() if not row.common and row.variant_of is None)
ALL: tuple[str, ...] = COMMON + EXTRA

_GROUPS: dict[str, tuple[str, ...]] = {"all": ALL, "common": COMMON, "none": ()}
_SEVERITIES = range(6)


def corrupt(image: NDArray[np.uint8], name: str, severity: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Corrupt one image; a pure function of its arguments.

    Args:
        image: uint8 ``[H, W, 3]``, RGB, any H, W >= 1; never modified.
        name: A key of `CORRUPTIONS`.
        severity: 1 to 5; 0 returns a copy of the input.
        rng: From `corruption_rng`; advanced by the draws that the corruption makes.

    Returns:
        A new uint8 array of the same shape.

    Raises:
        InputError: Unknown name, severity outside 0 to 5, another dtype or shape, or, for ``frost``, no textures.
    """
    pixels = np.ascontiguousarray(require_rgb8(image))
    if name not in CORRUPTIONS:
        raise _unknown(name, CORRUPTIONS)
    if isinstance(severity, bool) or not isinstance(severity, (int, np.integer)) or severity not in _SEVERITIES:
        raise InputError(f"severity {severity!r} of '{name}' is not one of 0, 1, 2, 3, 4, 5")
    if severity == 0:
        unchanged: NDArray[np.uint8] = pixels.copy()
        return unchanged
    return CORRUPTIONS[name].function(pixels, int(severity), rng)


def parse_corruptions(text: str) -> list[str]:
    """Read a choice of corruptions from a command line.

    Args:
        text: ``"all"`` (19), ``"common"`` (15), ``"none"``, or names separated by commas, variants included.

    Returns:
        The names, each once, in the order given.

    Raises:
        InputError: An unknown name, or none at all.
    """
    if text.strip() in _GROUPS:
        return list(_GROUPS[text.strip()])
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name in _GROUPS:
            raise InputError(f"'{name}' stands alone, it cannot be combined with names as in {text!r}")
        if name not in CORRUPTIONS:
            raise _unknown(name, [*_GROUPS, *CORRUPTIONS])
    return list(dict.fromkeys(names))


def _unknown(name: str, valid: Collection[str]) -> InputError:
    nearest = difflib.get_close_matches(str(name), valid, n=1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    return InputError(f"unknown corruption {name!r}{hint}", remedy=f"Valid: {', '.join(valid)}")
