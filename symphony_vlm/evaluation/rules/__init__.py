"""Scoring rules that several benchmarks share. Pure functions of text."""
