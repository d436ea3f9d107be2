"""Figures without panels: to make these and what is in them takes a sixth of the time of a small recipe."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.support.blank_figures import save_blank


class UndrawnPanel:
    """Takes the place of a panel and of all that its methods return, and does nothing."""

    def __getattr__(self, name: str) -> "UndrawnPanel":
        # Numpy asks whether it is an array.
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *arguments: Any, **options: Any) -> "UndrawnPanel":
        return self

    def __getitem__(self, key: Any) -> "UndrawnPanel":
        return self

    def __iter__(self) -> Iterator["UndrawnPanel"]:
        # The handles and the labels of a legend.
        return iter((self, self))


PANEL = UndrawnPanel()


@contextmanager
def leave_undrawn() -> Iterator[None]:
    """Saves every figure as a PNG of one pixel and draws nothing in it, in this process and until the block ends."""

    def subplots(figure: Figure, rows: int = 1, columns: int = 1, *, squeeze: bool = True, **options: Any) -> Any:
        panels = np.full((rows, columns), PANEL, object)
        return panels if not squeeze else panels.squeeze() if panels.size > 1 else PANEL

    with save_blank(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "subplots", subplots)
        for method in ("add_subplot", "add_axes", "colorbar", "legend"):
            patch.setattr(Figure, method, lambda *arguments, **options: PANEL)
        yield
