"""Separating the voices of a recording."""
