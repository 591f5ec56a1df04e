"""Vision backbones that mix near and far, registered with timm when this package is imported."""

from importlib import import_module
from pkgutil import iter_modules

from nearfar.vision import models

for _module in iter_modules(models.__path__):
    import_module(f"{models.__name__}.{_module.name}")
