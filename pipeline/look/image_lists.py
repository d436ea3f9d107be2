"""Lists of images as CSV files: those that `dataset.list` takes, and the pairs of near duplicates."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.look.findings import ImagePair


class ImageLister:
    """Writes lists of images of a store, which was made from `location`: a folder, or a file that lists images."""

    def __init__(self, store: Store, location: Path, ids: np.ndarray) -> None:
        base = (location if location.is_dir() else location.parent).resolve()
        labels = store.labels()
        self.rows: dict[int, tuple[str, str]] = {}
        for image_id, path in zip(ids.tolist(), store.read_paths(ids), strict=True):
            label = store.classes[labels[image_id]] if labels[image_id] >= 0 else ""
            file = base / path if path else None
            # Images that stand in a file with others have no file of their own.
            self.rows[image_id] = (str(file) if file and file.is_file() else "", label)

    def write_list(self, file: Path, ids: Iterable[int]) -> int:
        """Writes the images with their labels for `dataset.list`, and returns their number.

        Images without a path are left out.
        """
        rows = [self.rows[image_id] for image_id in ids if self.rows[image_id][0]]
        has_labels = any(label for _, label in rows)
        heads = ("path", "label") if has_labels else ("path",)
        _write_csv(file, heads, [row[: len(heads)] for row in rows])
        return len(rows)

    def write_pairs(self, file: Path, pairs: Sequence[ImagePair]) -> None:
        """Writes pairs of images with their cosines."""
        rows = [(self.rows[one.first][0], self.rows[one.second][0], f"{one.cosine:.4f}") for one in pairs]
        _write_csv(file, ("path", "near", "cosine"), rows)


def _write_csv(file: Path, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(rows)
    write_atomically(file, out.getvalue().encode())
