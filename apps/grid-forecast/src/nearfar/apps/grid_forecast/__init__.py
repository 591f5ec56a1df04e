"""Forecasts of gridded fields at the command line."""
