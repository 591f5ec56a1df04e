"""Decoding while the signal comes in."""
