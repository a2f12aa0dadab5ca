"""Chat sessions and the interfaces around them."""
