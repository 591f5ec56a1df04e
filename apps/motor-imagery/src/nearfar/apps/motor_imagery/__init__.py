"""Decode motor imagery from EEG recordings."""
