"""Segmentation of scans: networks, dense CRF, and a pipeline from the file to the score."""

from nearfar.core.lazy import offer

__all__, __getattr__, __dir__ = offer(__name__, __file__)
