"""Figures that are saved without being drawn: drawing takes half of the time of a small recipe."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg


@contextmanager
def save_blank() -> Iterator[None]:
    """Saves every figure of a report as a PNG of one pixel, in this process and until the block ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FigureCanvasAgg, "draw", lambda canvas: None)
        patch.setattr(FigureCanvasAgg, "buffer_rgba", lambda canvas: np.zeros((1, 1, 4), np.uint8))
        yield
