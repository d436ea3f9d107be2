"""Small sources of images that a test writes, and what is read from them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from firstlight.pipeline.config.dataset import DatasetOptions
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.data.sources import Record, Source, SourcePart, open_source
from firstlight.pipeline.data.store import Store


def dataset_options(**fields: Any) -> DatasetOptions:
    crop = [{"op": "center_crop"}]
    raw = {"name": "tiny", "test_fraction": 0.0, "train_augment": crop, "eval_augment": crop, **fields}
    return DatasetOptions.model_validate_json(json.dumps(raw, default=str))


def write_named_files(root: Path, *names: str) -> Path:
    """Writes files whose contents are their names, and returns the root."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def write_image_table(file: Path, images: list[Any], labels: list[Any] | None = None, **columns: Any) -> None:
    """Writes a Parquet file of images and labels with row groups of four."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({"image": images, **({} if labels is None else {"label": labels}), **columns}), file, row_group_size=4
    )


def read_split(source: Source, split: str = "train") -> list[Record]:
    return list(source.read(SourcePart(split, 0, source.splits.get(split, 0))))


def list_labels(source: Source, split: str = "train") -> list[tuple[str, int]]:
    """Returns (path, label) of each image of a split."""
    return [(record.path, record.label) for record in read_split(source, split)]


def open_folder_set(root: Path, **fields: Any) -> Source:
    return open_source(dataset_options(source="folder", root=root, **fields))


def open_parquet_set(root: Path, **fields: Any) -> Source:
    return open_source(dataset_options(source="parquet", root=root, **fields))


def open_list_set(file: Path, **fields: Any) -> Source:
    return open_source(dataset_options(source="list", list=file, **fields))


def write_csv(folder: Path, text: str, name: str = "list.csv") -> Path:
    (folder / name).write_bytes(text.encode())
    return folder / name


def open_archives(root: Path | str, **fields: Any) -> Source:
    return open_source(dataset_options(source="webdataset", root=root, **fields))


def list_reasons(source: Source) -> list[tuple[str, str]]:
    """Returns (path, reason) of each training image that cannot be read."""
    return [(record.path, record.reason) for record in read_split(source) if record.reason is not None]


def make_png(k: int) -> bytes:
    """Returns a PNG of 8 x 8 pixels, a different one for each k."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(k).integers(0, 255, (8, 8, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def prepare_store(found: DatasetOptions, folder: Path) -> Store:
    """Returns the store of a data set, written by this process."""
    return prepare(found, folder, lambda: False, lambda done, total: None)
