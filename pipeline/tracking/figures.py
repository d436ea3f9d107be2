"""Figures of a stage and seed: PNG files in its folder, the same files in MLflow, and an index of what they show."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import Field, TypeAdapter

from firstlight.pipeline.errors import one_line
from firstlight.pipeline.files import write_json
from firstlight.pipeline.records import DamagedRecord, RecordShape, check_shape
from firstlight.pipeline.tracking.client import FIGURES_FOLDER as FIGURES_FOLDER
from firstlight.pipeline.tracking.client import TrackingClient

FIGURES_INDEX = "index.json"
# Names of figures are names of files, and may come from a file that a worker has written.
FIGURE_NAME = re.compile(r"[\w.-]+\Z")
FIGURES_ADVICE = "delete this file: the report has no figures of this stage then"
FIGURE_DPI = 120


class _FigureShape(RecordShape):
    """An entry of the index. The name is that of a file in its folder."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+\z")]
    title: str
    alt: str


FIGURES_SHAPE = TypeAdapter(list[_FigureShape])


class SavableFigure(Protocol):
    """A figure of matplotlib, which this package does not import."""

    def savefig(self, file: Path, /, *, dpi: int) -> object: ...


@dataclass(frozen=True)
class FigureEntry:
    """A figure's file name without `.png`, its title, and a sentence that describes it for people who cannot see it."""

    name: str
    title: str
    alt: str


class FigureLog:
    """Writes the figures of a stage and seed to its folder and to MLflow. A figure counts once the index lists it."""

    def __init__(self, tracking: TrackingClient, run_id: str, folder: Path) -> None:
        self.tracking, self.run_id, self.folder = tracking, run_id, folder / FIGURES_FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self.entries: list[FigureEntry] = []

    def add(self, name: str, figure: SavableFigure, title: str, alt: str = "") -> None:
        """Saves a figure as `<name>.png`, logs it, and adds it to the index. The default of `alt` is the title."""
        if not FIGURE_NAME.match(name):
            raise DamagedRecord(f"{self.folder}: {name!r} is no name of a figure")
        file = self.folder / f"{name}.png"
        figure.savefig(file, dpi=FIGURE_DPI)
        self.tracking.log_figure(self.run_id, file, title)
        self.entries.append(FigureEntry(name, title, alt or title))
        write_json(self.folder / FIGURES_INDEX, [asdict(entry) for entry in self.entries])


def list_figures(folder: Path) -> list[tuple[Path, FigureEntry]]:
    """Returns the files and entries of the figures in the folder of a stage and seed, in the order of the index.

    Raises:
        DamagedRecord: the index is not what was written; names it.
    """
    index = folder / FIGURES_FOLDER / FIGURES_INDEX
    try:
        found = json.loads(index.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedRecord(f"{index}: is damaged: {one_line(error, 80)}; {FIGURES_ADVICE}") from None
    check_shape(found, FIGURES_SHAPE, str(index), FIGURES_ADVICE)
    entries = [FigureEntry(entry["name"], entry["title"], entry["alt"]) for entry in found]
    files = [(folder / FIGURES_FOLDER / f"{entry.name}.png", entry) for entry in entries]
    return [(file, entry) for file, entry in files if file.exists()]
