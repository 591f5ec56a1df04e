"""Operators that mix near: convolutions of a fixed or dynamic kernel."""
