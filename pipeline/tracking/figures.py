"""Index of the figures of a stage and seed: their files, and what they show."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from firstlight.pipeline.errors import one_line
from firstlight.pipeline.files import write_json
from firstlight.pipeline.records import DamagedRecord, RecordShape, check_shape
from firstlight.pipeline.tracking.client import FIGURES_FOLDER as FIGURES_FOLDER

FIGURES_INDEX = "index.json"
# Names of figures are names of files, and may come from a file that a worker has written.
FIGURE_NAME = re.compile(r"[\w.-]+\Z")
FIGURES_ADVICE = "delete this file: the report has no figures of this stage then"


class _FigureShape(RecordShape):
    """An entry of the index. The name is that of a file in its folder."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+\z")]
    title: str
    alt: str


FIGURES_SHAPE = TypeAdapter(list[_FigureShape])


@dataclass(frozen=True)
class FigureEntry:
    """A figure's file name without `.png`, its title, and a sentence that describes it for people who cannot see it."""

    name: str
    title: str
    alt: str


def write_figure_index(folder: Path, entries: Sequence[FigureEntry]) -> None:
    """Writes the index of a folder of figures."""
    write_json(folder / FIGURES_INDEX, [asdict(entry) for entry in entries])


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
