"""Features of images without a network, and their thumbnails: both are made where an image is decoded."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from firstlight.pipeline.data.channels.read_channels import open_channels
from firstlight.pipeline.data.channels.resampling import resample_box
from firstlight.pipeline.data.images import open_rgb
from firstlight.pipeline.data.splits import select_evenly_spaced
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.look.channel_pictures import ShownLevels, measure_shown_levels
from firstlight.pipeline.terminal import format_count

# The side of the image whose pixels are the features, and of thumbnails, in pixels.
FEATURE_SIDE, THUMBNAIL_SIDE = 16, 72
# Numbers of a feature vector, at most: those of 16 channels.
MAX_FEATURE_NUMBERS = 4096
THUMBNAIL_QUALITY = 70
# Images that say which levels are shown.
NUM_RANGE_IMAGES = 64
# Images that are read from the store at a time.
IMAGES_PER_READ = 256


def choose_feature_side(channels: int) -> int:
    """Returns the side of the images whose pixels are the features: 16, or less where there are many channels."""
    side = FEATURE_SIDE
    while side > 1 and channels * side**2 > MAX_FEATURE_NUMBERS:
        side //= 2
    return side


def describe_pixel_features(store: Store) -> str:
    """Returns what a page says of `embed_pixels`."""
    if store.stated_pixels is None:
        return f"pixels at {FEATURE_SIDE} x {FEATURE_SIDE}, without the mean colour"
    side, channels = choose_feature_side(store.pixels.channels), format_count(store.pixels.channels, "channel")
    return f"pixels of {channels} at {side} x {side}, each without its mean and scaled to the same spread"


def embed_pixels(store: Store, ids: np.ndarray, progress: Callable[[int, int], None]) -> np.ndarray:
    """Returns (n, d) float32 unit vectors: the pixels of each image at 16 x 16, without its mean colour; d is 768.

    Copies in another size, quality or brightness therefore have a cosine near 1. An image of one colour has the zero
    vector. Each channel of images with their channels as they are is divided by its spread in all of them, so that all
    count alike, and the side is that of `choose_feature_side`.
    """
    side, channels = choose_feature_side(store.pixels.channels), store.pixels.channels
    rows = np.zeros((len(ids), channels * side**2), np.float32)
    for start in range(0, len(ids), IMAGES_PER_READ):
        data, _ = store.read(ids[start : start + IMAGES_PER_READ])
        for k, encoded in enumerate(data):
            pixels = _shrink_image(store, encoded, side)
            rows[start + k] = (pixels - pixels.mean((0, 1))).ravel()
        progress(min(start + IMAGES_PER_READ, len(ids)), len(ids))
    # There is nothing but noise below a level of an eighth on average.
    rows[np.linalg.norm(rows, axis=1) <= side / 8] = 0.0
    if store.stated_pixels is not None:
        _equalize_channels(rows.reshape(len(ids), side**2, channels))
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    return rows


def _equalize_channels(levels: np.ndarray) -> None:
    """Divides each channel of (n, pixels, C) levels by its root mean square, in place; one without levels stays."""
    squares = np.einsum("npc,npc->c", levels, levels, dtype=np.float64) / max(levels.shape[0] * levels.shape[1], 1)
    levels /= np.where(squares > 0.0, np.sqrt(squares), 1.0).astype(np.float32)


def _shrink_image(store: Store, encoded: bytes, side: int) -> np.ndarray:
    """Returns the (side, side, C) float32 levels of an image."""
    if store.stated_pixels is None:
        image = open_rgb(encoded, levels=store.levels, least_side=2 * side)
        return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), np.float32)
    values = open_channels(encoded, store.stated_pixels).values
    height, width = values.shape[:2]
    whole = (0.0, 0.0, float(width), float(height))
    return resample_box(values, whole, side, side, store.pixels.white).astype(np.float32)


@dataclass(frozen=True)
class ThumbnailReader:
    """Thumbnails of a store's images as addresses of their data, which a page holds."""

    store: Store

    @cached_property
    def shown(self) -> ShownLevels | None:
        """The levels that are shown of images with their channels as they are; None for colours."""
        pixels = self.store.stated_pixels
        if pixels is None:
            return None
        sampled = select_evenly_spaced(np.arange(sum(self.store.splits.values())), NUM_RANGE_IMAGES)
        return measure_shown_levels(pixels, self.store.read(sampled)[0])

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
                out = io.BytesIO()
                self._draw(encoded).save(out, "JPEG", quality=THUMBNAIL_QUALITY)
                found[image_id] = out.getvalue()
        return found

    def _draw(self, encoded: bytes) -> Image.Image:
        if self.shown is not None:
            return self.shown.draw(encoded, THUMBNAIL_SIDE)
        image = open_rgb(encoded, levels=self.store.levels, least_side=2 * THUMBNAIL_SIDE)
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        return image
