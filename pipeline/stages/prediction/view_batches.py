"""Batches of images as the views that a fine-tuned model sees, packed into bytes that travel to the network.

Pixels are those of a training's evaluation: decoded and augmented by the same functions, in the same order.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from firstlight.pipeline.data.augment.ops import apply_batch, sample_params
from firstlight.pipeline.data.augment.random_numbers import derive_view_keys
from firstlight.pipeline.data.augment.targets import find_view_map, locate_image
from firstlight.pipeline.data.channels.pixel_format import RGB_PIXELS, PixelFormat
from firstlight.pipeline.data.images import BadImage
from firstlight.pipeline.errors import one_line
from firstlight.pipeline.stages.prediction.image_items import ImageItems
from firstlight.pipeline.stages.prediction.saved_model import Preprocessing

# The key of a packed batch that holds [position, reason] of the images that cannot be used, as JSON.
REFUSED_KEY = "refused"


@dataclass(frozen=True)
class ViewBatches:
    """The views of `items` in batches of `batch_size` images, for `predict_batches`."""

    items: ImageItems
    preprocessing: Preprocessing
    batch_size: int

    @property
    def num_batches(self) -> int:
        return -(-len(self.items) // self.batch_size)

    @property
    def max_batch_bytes(self) -> int:
        """The bytes of the pixels of a batch of whole images; windows may be more."""
        return (
            self.batch_size
            * len(self.preprocessing.views)
            * self.preprocessing.image_size**2
            * self._format.pixel_bytes
        )

    @property
    def _format(self) -> PixelFormat:
        return self.preprocessing.pixels or RGB_PIXELS

    def load_pixels(self, index: int) -> np.ndarray:
        """Returns a packed batch, (n,) uint8.

        It holds of B images with V views together: `position` (B,) and `size` (B, 2) int64, `count` (B,), the number of
        views of each; `pixels` (V, S, S, C) uint8 or uint16, `region` (V, 4) float32 and `to_view` (V, 2, 3) float64;
        and the images that cannot be used.
        """
        start, side = index * self.batch_size, self.preprocessing.image_size
        positions, sizes, counts, refused = [], [], [], list[tuple[int, str]]()
        pixels, regions, maps = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
        for position in range(start, min(start + self.batch_size, len(self.items))):
            try:
                image = self.items.open_image(position, self.preprocessing)
                views = self.preprocessing.list_views(image.size)
            except BadImage as error:
                refused.append((position, one_line(error, limit=None)))
                continue
            (image_id,) = self.items.find_ids([position])
            for view, ops in enumerate(views):
                keys = derive_view_keys(0, np.zeros(1, np.int64), np.array([image_id]), view)
                sampled = sample_params(ops, keys, np.array([image.size]), side)
                (params,) = zip(*(op.params_per_image() for op in sampled), strict=True)
                pixels += apply_batch([image], sampled, side)
                regions.append(locate_image(params, side))
                maps.append(find_view_map(params, image.size, side))
            positions.append(position)
            sizes.append(image.size)
            counts.append(len(views))
        return pack_arrays(
            {
                "position": np.array(positions, np.int64),
                "size": np.array(sizes, np.int64).reshape(-1, 2),
                "count": np.array(counts, np.int64),
                "pixels": np.array(pixels, self._format.dtype).reshape(-1, side, side, self._format.channels),
                "region": np.array(regions, np.float32).reshape(-1, 4),
                "to_view": np.array(maps, np.float64).reshape(-1, 2, 3),
                REFUSED_KEY: pack_refused(refused),
            }
        )


def pack_refused(refused: list[tuple[int, str]]) -> np.ndarray:
    """Returns positions and reasons as (n,) uint8, for `unpack_refused`."""
    return np.frombuffer(json.dumps(refused).encode(), np.uint8)


def unpack_refused(data: np.ndarray) -> list[tuple[int, str]]:
    """Returns the positions of the images that cannot be used, with the reasons."""
    return [(position, reason) for position, reason in json.loads(data.tobytes())]


def pack_arrays(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns named arrays as (n,) uint8, for `unpack_arrays`."""
    return np.frombuffer(save_arrays({name: np.ascontiguousarray(array) for name, array in arrays.items()}), np.uint8)


def unpack_arrays(packed: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the arrays that `pack_arrays` has packed."""
    found: dict[str, np.ndarray] = load_arrays(packed.tobytes())
    return found
