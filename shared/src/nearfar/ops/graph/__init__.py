"""Operators that mix along the edges of a graph."""
