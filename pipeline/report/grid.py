"""A figure of images in rows and columns. All share one pair of axes: with one for each, drawing takes seconds."""

from collections.abc import Iterable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# Inches between images, and for a title.
GRID_GAP, GRID_TITLE_HEIGHT = 0.07, 0.3
# Characters of a name in a figure.
MAX_LABEL_LENGTH = 32
# A dollar in the name of a class does not begin a formula.
matplotlib.rcParams["text.parse_math"] = False


def display_names(names: Iterable[str]) -> list[str]:
    """Returns names of classes for a figure: on one line, of at most MAX_LABEL_LENGTH characters.

    A space is put before a leading `_`, because matplotlib leaves such names out of legends.
    """
    found = []
    for name in names:
        line = "".join(c if c.isprintable() else " " for c in name)
        short = line if len(line) <= MAX_LABEL_LENGTH else line[: MAX_LABEL_LENGTH - 1] + "\N{HORIZONTAL ELLIPSIS}"
        found.append(f" {short}" if short.startswith("_") else short)
    return found


class GridFigure:
    """Draws images in rows and columns of equal cells. All lengths are in inches.

    `cell`: the side of a cell. `above`: the space over each row, for captions. `left`: the space before the first
    column, for labels of rows. `apart`: the space between the first column and the others.
    """

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
        width = left + apart + columns * (cell + GRID_GAP) + GRID_GAP
        height = GRID_TITLE_HEIGHT + rows * (cell + max(above, GRID_GAP)) + GRID_GAP
        self.figure = Figure(figsize=(width, height), facecolor="white")
        self.axis = self.figure.add_axes((0, 0, 1, 1))
        self.axis.set_axis_off()
        # Data coordinates are inches, downwards from the upper left corner.
        self.axis.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
        self.axis.text(width / 2, 0.06, title, fontsize=10, ha="center", va="top")

    def draw_image(self, row: int, column: int, picture: np.ndarray, **how: Any) -> None:
        """Draws an (H, W) or (H, W, 3) image as large as the cell allows. `how`: arguments of matplotlib's `imshow`."""
        x, y = self._cell_corner(row, column)
        height, width = picture.shape[:2]
        w, h = (self.cell * side / max(height, width) for side in (width, height))
        x, y = x + (self.cell - w) / 2, y + (self.cell - h) / 2
        self.axis.imshow(picture, extent=(x, x + w, y + h, y), aspect="auto", **{"interpolation": "nearest", **how})

    def draw_frame(self, row: int, column: int, colour: str) -> None:
        """Draws a frame around a cell."""
        self.axis.add_patch(
            Rectangle(self._cell_corner(row, column), self.cell, self.cell, fill=False, edgecolor=colour, linewidth=3)
        )

    def draw_caption(self, row: int, column: int, text: str, *, size: float = 8, centred: bool = False) -> None:
        """Writes a text over a cell."""
        x, y = self._cell_corner(row, column)
        self.axis.text(
            x + self.cell / 2 if centred else x,
            y - 0.04,
            text,
            fontsize=size,
            ha="center" if centred else "left",
            va="bottom",
        )

    def draw_row_label(self, row: int, text: str) -> None:
        """Writes a text to the left of a row."""
        _, y = self._cell_corner(row, 0)
        self.axis.text(self.left - 0.04, y + self.cell / 2, text, fontsize=8, ha="right", va="center")

    def _cell_corner(self, row: int, column: int) -> tuple[float, float]:
        """Returns x and y of the upper left corner of a cell."""
        x = self.left + GRID_GAP + column * (self.cell + GRID_GAP) + (self.apart if column else 0.0)
        return x, GRID_TITLE_HEIGHT + row * (self.cell + max(self.above, GRID_GAP)) + self.above
