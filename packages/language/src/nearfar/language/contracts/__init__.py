"""Contracts of the language systems."""
