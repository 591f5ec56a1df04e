"""Contracts of the EEG systems."""
