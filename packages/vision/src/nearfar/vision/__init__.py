"""Vision backbones that mix near and far, registered with timm when this package is imported."""

from importlib import import_module
from pkgutil import iter_modules

TOOLS = {"classification", "cost", "inspect", "pictures", "training"}
"""Modules without models, which are slow to import."""

for _module in iter_modules(__path__):
    if _module.name not in TOOLS:
        import_module(f"{__name__}.{_module.name}")
