"""Folders of smooth JPEG images of several sizes, as photographs are, and the stores that are prepared of them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from firstlight.pipeline.config.dataset import DatasetOptions
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.data.store import Store

# Width and height of the photographs, which repeat.
PHOTOGRAPH_SIZES = ((96, 64), (60, 90), (40, 30), (131, 77), (64, 64))


def make_photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode_photograph(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}), **options)
    return file.getvalue()


def write_photographs(root: Path, count: int, sizes: tuple[tuple[int, int], ...] = PHOTOGRAPH_SIZES) -> Path:
    """Writes photographs of two classes, each of another size than the one before, and returns the root."""
    for number in range(count):
        file = root / "ab"[number % 2] / f"{number:03d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_photograph(make_photograph(*sizes[number % len(sizes)], seed=number)))
    return root


def photograph_options(root: Path, **fields: Any) -> DatasetOptions:
    crop = [{"op": "center_crop"}]
    raw = {"name": "photographs", "source": "folder", "root": root, "test_fraction": 0.2, "image_size": 16}
    return DatasetOptions.model_validate_json(
        json.dumps({**raw, "train_augment": crop, "eval_augment": crop, **fields}, default=str)
    )


def prepare_photographs(root: Path, stores: Path, auto_side: int | None = None, **fields: Any) -> Store:
    """Returns the store of the photographs in `root`, written by this process."""
    options = photograph_options(root, **fields)
    return prepare(options, stores, lambda: False, lambda done, total: None, auto_side=auto_side)
