"""Speaker verification and speech separation."""

from nearfar.core.lazy import offer

__all__, __getattr__, __dir__ = offer(__name__, __file__)
