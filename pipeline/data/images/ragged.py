"""Decoded images of any sizes, which are opened without being copied or decoded again."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from firstlight.pipeline.data.images.pixel_views import PIXEL_BYTES, view_as_image


@dataclass(frozen=True)
class RaggedImages:
    """RGB images: `pixels` are (height, width, 4) uint8 of each."""

    pixels: list[np.ndarray]

    @staticmethod
    def collect(images: Iterable[Image.Image]) -> "RaggedImages":
        """Returns images of mode RGB, which are copied."""
        return RaggedImages([np.array(image.convert("RGBX")) for image in images])

    @staticmethod
    def split_buffer(buffer: np.ndarray, sizes: np.ndarray) -> "RaggedImages":
        """Returns the images of (n, 2) widths and heights that lie one after the other in (total, 4) uint8."""
        starts = np.concatenate([[0], np.cumsum(sizes.prod(1))]).tolist()
        return RaggedImages(
            [
                buffer[start : start + width * height].reshape(height, width, PIXEL_BYTES)
                for start, (width, height) in zip(starts, sizes.tolist(), strict=False)
            ]
        )

    @property
    def sizes(self) -> np.ndarray:
        """(n, 2) int64 widths and heights."""
        return np.array([(part.shape[1], part.shape[0]) for part in self.pixels], np.int64).reshape(-1, 2)

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in self.pixels)

    def open_image(self, number: int) -> Image.Image:
        """Returns an image of mode RGB that shares its pixels, so that it must not be changed in place."""
        return view_as_image(self.pixels[number])
