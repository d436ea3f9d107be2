"""Folders of small grey images, and the stores that are prepared of them in this process."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from firstlight.pipeline.config.dataset import DatasetOptions
from firstlight.pipeline.data.images import decode_rgb
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.data.store import Store


def dataset(**fields: Any) -> DatasetOptions:
    crop = [{"op": "center_crop"}]
    raw = {
        "name": "tiny",
        "source": "folder",
        "test_fraction": 0.2,
        "train_augment": crop,
        "eval_augment": crop,
        **fields,
    }
    return DatasetOptions.model_validate_json(json.dumps(raw, default=str))


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 3 + value % 3, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def images(root: Path, count: int, bad: tuple[int, ...] = ()) -> Path:
    """Writes `count` training images of two classes and 6 test images.

    Image k is grey of value k; the bad ones are truncated.
    """
    for split, first, n in (("train", 0, count), ("test", 200, 6)):
        for k in range(n):
            file = root / split / "ab"[k % 2] / f"{k:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(first + k)[:40] if k in bad and split == "train" else png(first + k))
    return root


def silent(done: int, total: int) -> None:
    pass


def local(data: DatasetOptions, stores: Path) -> Store:
    return prepare(data, stores, on_ray=lambda: False, progress=silent)


def greys(store: Store) -> list[int]:
    """The value of every image, by id."""
    total = sum(store.splits.values())
    return [int(decode_rgb(data)[0, 0, 0]) for data in store.read(np.arange(total))[0]]
