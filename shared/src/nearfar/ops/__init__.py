"""Operators: each mixes positions of a sequence, a grid or a graph. Depends on torch, einops and jaxtyping only."""
