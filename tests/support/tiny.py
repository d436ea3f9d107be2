"""Tiny sources in layouts that a test writes, and what is read from them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from firstlight.pipeline.config.recipe import Dataset
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.data.sources import Part, Record, Source, open_source
from firstlight.pipeline.data.store import Store


def dataset(**fields: Any) -> Dataset:
    crop = [{"op": "center_crop"}]
    raw = {"name": "tiny", "test_fraction": 0.0, "train_augment": crop, "eval_augment": crop, **fields}
    return Dataset.model_validate_json(json.dumps(raw, default=str))


def files(root: Path, *names: str) -> Path:
    """Files whose contents are their names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def table(file: Path, images: list[Any], labels: list[Any] | None = None, **columns: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({"image": images, **({} if labels is None else {"label": labels}), **columns}), file, row_group_size=4
    )


def everything(source: Source, split: str = "train") -> list[Record]:
    return list(source.read(Part(split, 0, source.splits.get(split, 0))))


def summary(source: Source, split: str = "train") -> list[tuple[str, int]]:
    return [(record.path, record.label) for record in everything(source, split)]


def folder(root: Path, **fields: Any) -> Source:
    return open_source(dataset(source="folder", root=root, **fields))


def parquet(root: Path, **fields: Any) -> Source:
    return open_source(dataset(source="parquet", root=root, **fields))


def picture(k: int) -> bytes:
    """A PNG of 8 x 8 pixels, another for each k."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(k).integers(0, 255, (8, 8, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def prepared(found: Dataset, folder: Path) -> Store:
    """Its store, written by this process."""
    return prepare(found, folder, lambda: False, lambda done, total: None)
