"""Measurements of speed. ``python -m benchmarks.run NAME`` runs ``benchmarks/NAME.py``."""

import symphony_vlm  # noqa: F401  # first, as its import hooks must stand before transformers and torchvision come
