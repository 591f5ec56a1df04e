"""Tiles and whole slides of histology: classifiers, their training, their scores, and answers over a slide."""

from pathlib import Path

RECIPES = Path(__file__).parent / "recipes"
