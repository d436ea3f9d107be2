"""The pictures of one stage and seed: PNG files beside its other files, in MLflow under the same names, and what each of them shows."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure

from firstlight.pipeline.files import write_json
from firstlight.pipeline.tracking.client import Tracking

FOLDER, INDEX = "figures", "index.json"
DPI = 120


@dataclass(frozen=True)
class Entry:
    """One picture. `alt`: what it shows, in a sentence, for those who do not see it."""

    name: str
    title: str
    alt: str


class Album:
    """`add` puts a picture in. The index, written after each, makes it count."""

    def __init__(self, tracking: Tracking, run_id: str, folder: Path) -> None:
        self.tracking, self.run_id, self.folder = tracking, run_id, folder / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self.entries: list[Entry] = []

    def add(self, name: str, figure: Figure, title: str, alt: str = "") -> None:
        """`name`: of the file, without `.png`."""
        file = self.folder / f"{name}.png"
        figure.savefig(file, dpi=DPI)
        self.tracking.client.log_artifact(self.run_id, str(file), FOLDER)
        self.entries.append(Entry(name, title, alt or title))
        write_json(self.folder / INDEX, [asdict(entry) for entry in self.entries])


def pictures(folder: Path) -> list[tuple[Path, Entry]]:
    """What an album holds, in its order: the file of each picture and what it shows. `folder`: of the stage and seed."""
    try:
        entries = [Entry(**entry) for entry in json.loads((folder / FOLDER / INDEX).read_text("utf-8"))]
    except (OSError, ValueError, TypeError):
        return []
    files = [(folder / FOLDER / f"{entry.name}.png", entry) for entry in entries]
    return [(file, entry) for file, entry in files if file.exists()]
