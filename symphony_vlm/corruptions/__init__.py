"""The corruptions of ImageNet-C for images of any size, with a generator keyed by image, name, severity and seed."""

from symphony_vlm.corruptions.catalogue import (
    ALL,
    COMMON,
    CORRUPTIONS,
    EXTRA,
    Corruption,
    corrupt,
    parse_corruptions,
)
from symphony_vlm.corruptions.frost_textures import find_frost_textures
from symphony_vlm.corruptions.placement import at_long_side, parse_corrupt_at
from symphony_vlm.corruptions.randomness import canary, corruption_rng, image_key

__all__ = [
    "ALL",
    "COMMON",
    "CORRUPTIONS",
    "EXTRA",
    "Corruption",
    "at_long_side",
    "canary",
    "corrupt",
    "corruption_rng",
    "find_frost_textures",
    "image_key",
    "parse_corrupt_at",
    "parse_corruptions",
]
