"""Contracts of the medical systems."""
