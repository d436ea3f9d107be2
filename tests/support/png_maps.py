"""Arrays of numbers as PNG files."""

import io

import numpy as np
from PIL import Image


def png(values: np.ndarray, mode: str = "P", **options: int) -> bytes:
    """(H, W) numbers as a file; a palette of random colours, so that they differ from the numbers."""
    image, file = Image.fromarray(values).convert("L") if mode == "P" else Image.fromarray(values), io.BytesIO()
    if mode == "P":
        image = Image.frombytes("P", image.size, values.astype(np.uint8).tobytes())
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    image.save(file, "PNG", **options)
    return file.getvalue()
