"""Measurements of speed. ``python -m benchmarks.run NAME`` runs ``benchmarks/NAME.py``."""
