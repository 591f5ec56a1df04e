"""Operators that mix in the frequency domain."""
