"""Contracts of the audio systems."""
