"""Finds out what of an installation works, by trying it: ``symphony-vlm doctor``."""
