"""Evaluation entry points: ``python -m eval.benchmark``, ``eval.robustness``, ``eval.report``."""
