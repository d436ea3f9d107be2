"""Features of images without a network, and their thumbnails: both are made where an image is decoded."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from firstlight.pipeline.data.images import open_rgb
from firstlight.pipeline.data.store import Store

# The side of the image whose pixels are the features, and of thumbnails, in pixels.
FEATURE_SIDE, THUMBNAIL_SIDE = 16, 72
THUMBNAIL_QUALITY = 70
# Images that are read from the store at a time.
IMAGES_PER_READ = 256


def embed_pixels(store: Store, ids: np.ndarray, progress: Callable[[int, int], None]) -> np.ndarray:
    """Returns (n, 768) float32 unit vectors: the pixels of each image at 16 x 16, without its mean colour.

    So copies in another size, quality or brightness have a cosine near 1. An image of one colour has the zero vector.
    """
    rows = np.zeros((len(ids), 3 * FEATURE_SIDE**2), np.float32)
    for start in range(0, len(ids), IMAGES_PER_READ):
        data, _ = store.read(ids[start : start + IMAGES_PER_READ])
        for k, encoded in enumerate(data):
            image = open_rgb(encoded, levels=store.levels, least_side=2 * FEATURE_SIDE)
            small = image.resize((FEATURE_SIDE, FEATURE_SIDE), Image.Resampling.BILINEAR)
            pixels = np.asarray(small, np.float32)
            rows[start + k] = (pixels - pixels.mean((0, 1))).ravel()
        progress(min(start + IMAGES_PER_READ, len(ids)), len(ids))
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    # Below a level of an eighth on average there is nothing but noise.
    return np.where(lengths > FEATURE_SIDE / 8, rows / np.maximum(lengths, 1e-9), 0.0).astype(np.float32)


@dataclass(frozen=True)
class ThumbnailReader:
    """Thumbnails of a store's images as addresses of their data, which a page holds."""

    store: Store

    def read(self, ids: np.ndarray) -> dict[int, str]:
        """Returns the thumbnail of each image, at most 72 pixels wide and high."""
        return {
            image_id: f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
            for image_id, data in self.read_files(ids).items()
        }

    def read_files(self, ids: np.ndarray) -> dict[int, bytes]:
        """Returns the same thumbnails as JPEG files."""
        found = {}
        for start in range(0, len(ids), IMAGES_PER_READ):
            part = ids[start : start + IMAGES_PER_READ]
            for image_id, encoded in zip(part.tolist(), self.store.read(part)[0], strict=True):
                image = open_rgb(encoded, levels=self.store.levels, least_side=2 * THUMBNAIL_SIDE)
                image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
                out = io.BytesIO()
                image.save(out, "JPEG", quality=THUMBNAIL_QUALITY)
                found[image_id] = out.getvalue()
        return found
