"""What one request to the server may ask for."""

from __future__ import annotations

from dataclasses import dataclass

from symphony_vlm.serving.uploads import MAX_UPLOAD_BYTES, MAX_UPLOAD_PIXELS

__all__ = ["RequestLimits"]


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """Limits of one request; what exceeds them is refused before it costs much."""

    max_body_bytes: int = 32 * 2**20
    body_seconds: float = 60.0
    """In which the request must have arrived."""
    max_images: int = 16
    max_image_bytes: int = MAX_UPLOAD_BYTES
    max_pixels: int = MAX_UPLOAD_PIXELS
    max_characters: int = 400_000
    """Of all texts together. The model's positions are the narrower limit, but counting tokens takes time."""
    max_tokens: int = 1024
    """Longest answer, and what a request without a wish gets."""
