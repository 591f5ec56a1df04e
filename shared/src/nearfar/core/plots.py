"""The project's plotting style: one place, readable for colour-blind people, no global state."""

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl
from cycler import cycler
from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
"""Okabe and Ito's palette, in the order that plots use it."""


@contextmanager
def style() -> Iterator[None]:
    """Figures made in this block have the project's style; matplotlib's settings outside stay as they are."""
    with mpl.rc_context():
        mpl.rcdefaults()  # some libraries change the settings when imported
        mpl.rcParams.update(
            {
                "axes.prop_cycle": cycler(color=COLORS),
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "grid.alpha": 0.3,
                "figure.constrained_layout.use": True,
                "font.size": 10,
            }
        )
        yield


def new_figure(width: float = 7.0, height: float = 4.0) -> Figure:
    """An empty figure of `width` x `height` inches that is not tied to pyplot, so it is freed when dropped."""
    return Figure(figsize=(width, height), layout="constrained")
