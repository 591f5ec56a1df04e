"""Name regions of pictures."""
