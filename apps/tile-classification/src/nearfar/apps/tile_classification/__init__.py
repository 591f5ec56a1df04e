"""Classify histology tiles and whole slides."""
