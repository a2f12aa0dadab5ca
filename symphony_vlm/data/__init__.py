"""Reads, checks, generates and encodes conversations with images. Knows nothing of models or training."""
