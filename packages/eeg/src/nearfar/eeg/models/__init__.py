"""Decoders of motor imagery."""
