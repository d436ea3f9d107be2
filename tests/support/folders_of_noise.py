"""Folders of PNG images of noise, a folder for each class."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def write_noise_folder(root: Path, classes: Mapping[str, int], size: tuple[int, int], mode: str = "RGB") -> None:
    """Writes as many images of each class as `classes` says, named 0.png, 1.png ..., of `size` (width, height)."""
    rng = np.random.default_rng(len(classes))
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(root / name / f"{k}.png")
