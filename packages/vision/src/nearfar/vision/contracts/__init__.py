"""Contracts of the vision systems."""
