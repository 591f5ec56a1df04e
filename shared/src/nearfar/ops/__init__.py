"""Operators: each mixes positions of a sequence, a grid or a graph. Depends on torch, einops and jaxtyping only."""

from nearfar.ops.common.precision import guard_bfloat16

BFLOAT16_GUARDED = guard_bfloat16()  # before the first computation
