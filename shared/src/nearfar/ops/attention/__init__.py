"""Operators that mix far: attention."""
