"""A board of images in rows and columns, with captions: one pair of axes for all of them, as one for each takes seconds to draw."""

from collections.abc import Iterable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

GAP, HEAD = 0.07, 0.3  # inches between images, and for a title
LABEL = 32  # characters of a name in a picture, at most
matplotlib.rcParams["text.parse_math"] = False  # a dollar in a name is a dollar


def shown_names(names: Iterable[str]) -> list[str]:
    """Names of classes as a picture can show them: no longer than LABEL, in one line, and none that matplotlib leaves out of its legends."""
    found = []
    for name in names:
        line = "".join(c if c.isprintable() else " " for c in name)
        short = line if len(line) <= LABEL else line[: LABEL - 1] + "\N{HORIZONTAL ELLIPSIS}"
        found.append(f" {short}" if short.startswith("_") else short)
    return found


class Board:
    """`cell`: the side of a place in inches; `above`: the inches over each row, for captions; `left`: beside all rows; `apart`: between the first
    column and the others."""

    def __init__(
        self,
        rows: int,
        columns: int,
        cell: float,
        title: str,
        *,
        above: float = 0.22,
        left: float = 0.0,
        apart: float = 0.0,
    ) -> None:
        self.cell, self.above, self.left, self.apart = cell, above, left, apart
        width = left + apart + columns * (cell + GAP) + GAP
        height = HEAD + rows * (cell + max(above, GAP)) + GAP
        self.figure = Figure(figsize=(width, height), facecolor="white")
        self.axis = self.figure.add_axes((0, 0, 1, 1))
        self.axis.set_axis_off()
        self.axis.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)  # in inches, downwards
        self.axis.text(width / 2, 0.06, title, fontsize=10, ha="center", va="top")

    def image(self, row: int, column: int, picture: np.ndarray, **how: Any) -> None:
        """(H, W) or (H, W, 3), as large as its place allows; `how`: as matplotlib's `imshow`."""
        x, y = self._place(row, column)
        height, width = picture.shape[:2]
        w, h = (self.cell * side / max(height, width) for side in (width, height))
        x, y = x + (self.cell - w) / 2, y + (self.cell - h) / 2
        self.axis.imshow(picture, extent=(x, x + w, y + h, y), aspect="auto", **{"interpolation": "nearest", **how})

    def frame(self, row: int, column: int, colour: str) -> None:
        """Around a place."""
        self.axis.add_patch(
            Rectangle(self._place(row, column), self.cell, self.cell, fill=False, edgecolor=colour, linewidth=3)
        )

    def caption(self, row: int, column: int, text: str, *, size: float = 8, centred: bool = False) -> None:
        """Over a place."""
        x, y = self._place(row, column)
        self.axis.text(
            x + self.cell / 2 if centred else x,
            y - 0.04,
            text,
            fontsize=size,
            ha="center" if centred else "left",
            va="bottom",
        )

    def beside(self, row: int, text: str) -> None:
        """At the left of a row."""
        _, y = self._place(row, 0)
        self.axis.text(self.left - 0.04, y + self.cell / 2, text, fontsize=8, ha="right", va="center")

    def _place(self, row: int, column: int) -> tuple[float, float]:
        """Its upper left corner."""
        x = self.left + GAP + column * (self.cell + GAP) + (self.apart if column else 0.0)
        return x, HEAD + row * (self.cell + max(self.above, GAP)) + self.above
