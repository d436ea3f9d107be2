"""Figures that are saved without being drawn: drawing takes half of the time of a small recipe."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image


@contextmanager
def save_blank() -> Iterator[None]:
    """Saves every figure as a PNG of one pixel, in this process and until the block ends."""

    def save(figure: Figure, file: Path, **options: Any) -> None:
        Image.new("RGB", (1, 1)).save(file, "PNG")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        yield
