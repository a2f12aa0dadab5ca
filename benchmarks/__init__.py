"""Measurements of speed. ``python -m benchmarks.run NAME`` runs ``benchmarks/NAME.py``."""

import os

import symphony_vlm  # noqa: F401  # first, as its import hooks must stand before transformers and torchvision come

# As the command line sets it, before torch's first tensor: see docs/performance.md, "Memory of a CPU run".
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
