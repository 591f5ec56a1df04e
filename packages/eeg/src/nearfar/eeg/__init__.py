"""Motor-imagery EEG: recordings, preprocessing, electrode graphs, AGTCNet, baselines and honest protocols."""

from nearfar.core.lazy import offer

__all__, __getattr__, __dir__ = offer(__name__, __file__)
