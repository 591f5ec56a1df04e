"""Selecting, fusing and routing tokens."""
