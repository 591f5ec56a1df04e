"""Vision models that mix near and far. Once this package is imported, timm finds its backbones by name."""

from nearfar.core.lazy import offer
from nearfar.vision.waiting import register

register()
__all__, __getattr__, __dir__ = offer(__name__, __file__)
