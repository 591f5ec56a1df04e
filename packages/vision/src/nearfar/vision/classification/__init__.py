"""Training and using picture classifiers."""

from pathlib import Path

RECIPES = Path(__file__).parent / "recipes"
"""YAML files that state the published recipes."""
