"""Rules that several benchmarks share: pure functions of texts."""
