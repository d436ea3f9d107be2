"""Figures of a stage and seed: PNG files in its folder, the same files in MLflow, and an index of what they show."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from firstlight.pipeline.records import DamagedRecord
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.tracking.figures import FIGURE_NAME, FIGURES_FOLDER, FigureEntry, write_figure_index

# Dots per inch.
FIGURE_DPI = 120
# Higher levels take twice the time, for a few per cent of the bytes.
PNG_COMPRESSION = 3


def save_figure(figure: Figure, file: Path) -> None:
    """Writes a figure, which must be opaque, as a PNG file of FIGURE_DPI.

    `Figure.savefig` draws all that has a layout twice, the first time to find its layout. The pixels are the same.
    """
    figure.set_dpi(FIGURE_DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.save(file, "PNG", dpi=(FIGURE_DPI, FIGURE_DPI), compress_level=PNG_COMPRESSION)


class FigureLog:
    """Writes the figures of a stage and seed to its folder and to MLflow. A figure counts once the index lists it."""

    def __init__(self, tracking: TrackingClient, run_id: str, folder: Path) -> None:
        self.tracking, self.run_id, self.folder = tracking, run_id, folder / FIGURES_FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self.entries: list[FigureEntry] = []

    def add(self, name: str, figure: Figure, title: str, alt: str = "") -> None:
        """Saves a figure as `<name>.png`, logs it, and adds it to the index. The default of `alt` is the title."""
        if not FIGURE_NAME.match(name):
            raise DamagedRecord(f"{self.folder}: {name!r} is no name of a figure")
        file = self.folder / f"{name}.png"
        save_figure(figure, file)
        self.tracking.log_figure(self.run_id, file, title)
        self.entries.append(FigureEntry(name, title, alt or title))
        write_figure_index(self.folder, self.entries)
