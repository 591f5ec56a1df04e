"""Causal sequence mixers as transformers models."""

from nearfar.core.lazy import offer

__all__, __getattr__, __dir__ = offer(__name__, __file__)
