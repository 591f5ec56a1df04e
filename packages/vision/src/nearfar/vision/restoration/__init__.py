"""Restoring pictures: super-resolution models, degradations, metrics and inference of any size."""
