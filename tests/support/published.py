"""A source opened as a recipe would, all that it holds, and what it refuses."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.images import decode
from firstlight.pipeline.data.sources import Source, open_source
from firstlight.pipeline.errors import UserError
from tests.support.layouts import noise
from tests.support.tiny import dataset, everything

__all__ = ["jpegs", "noise", "opened", "pixels", "refusal", "texts"]


def opened(source: str, root: Path, **fields: Any) -> Source:
    return open_source(dataset(source=source, root=root, **fields))


def pixels(source: Source, split: str = "train") -> np.ndarray:
    """(n, H, W, 3) uint8, decoded."""
    return np.stack([decode(record.data or b"") for record in everything(source, split)])


def refusal(source: str, root: Path, **fields: Any) -> str:
    """The one line that opening it ends in."""
    with pytest.raises(UserError) as error:
        opened(source, root, **fields)
    assert "\n" not in str(error.value)
    return str(error.value)


def jpegs(root: Path, *names: str) -> Path:
    """An image file for each name, 6 x 4, all different."""
    for k, name in enumerate(names):
        file = io.BytesIO()
        Image.fromarray(np.full((4, 6, 3), 7 * k % 256, np.uint8)).save(file, "JPEG")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(file.getvalue())
    return root


def texts(root: Path, **files: str) -> Path:
    """Text files; `__` in a keyword stands for a slash, and .txt is added."""
    for name, content in files.items():
        file = root / f"{name.replace('__', '/')}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return root
