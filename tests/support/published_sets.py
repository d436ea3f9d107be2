"""Published sets: a source opened as a recipe would, its content, and its errors."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.images import decode_rgb
from firstlight.pipeline.data.sources import Source, open_source
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import dataset_options, read_split
from tests.support.layouts import noise

__all__ = ["decode_split", "get_refusal", "noise", "open_set", "write_jpegs", "write_texts"]


def open_set(source: str, root: Path, **fields: Any) -> Source:
    return open_source(dataset_options(source=source, root=root, **fields))


def decode_split(source: Source, split: str = "train") -> np.ndarray:
    """Returns the decoded images of a split, (n, H, W, 3) uint8."""
    return np.stack([decode_rgb(record.data or b"") for record in read_split(source, split)])


def get_refusal(source: str, root: Path, **fields: Any) -> str:
    """Returns the one-line error that opening the source raises."""
    with pytest.raises(UserError) as error:
        open_set(source, root, **fields)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_jpegs(root: Path, *names: str) -> Path:
    """Writes an image file of 6 x 4 pixels for each name, all different, and returns the root."""
    for k, name in enumerate(names):
        file = io.BytesIO()
        Image.fromarray(np.full((4, 6, 3), 7 * k % 256, np.uint8)).save(file, "JPEG")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(file.getvalue())
    return root


def write_texts(root: Path, **files: str) -> Path:
    """Writes text files; `__` in a keyword stands for a slash, and .txt is added."""
    for name, content in files.items():
        file = root / f"{name.replace('__', '/')}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return root
