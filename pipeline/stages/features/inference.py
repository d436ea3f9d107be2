"""Ids -> answers of a network, by Ray Data (decoding tasks feed a pool of actors) or in this process."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from firstlight.pipeline.data.loader import Loader
from firstlight.pipeline.data.ray_data import ActorPool, NetworkFunction, predict_on_actors
from firstlight.pipeline.data.stream import call_in_threads, prefetch_items


class PixelBatches(Protocol):
    """Batches of pixels by their number. Tasks load them, so an object of this kind pickles small."""

    @property
    def num_batches(self) -> int: ...

    @property
    def max_batch_bytes(self) -> int:
        """Number of bytes of the pixels of the largest batch."""
        ...

    def load_pixels(self, index: int) -> np.ndarray:
        """Returns a batch as the network takes it, uint8."""
        ...


@dataclass(frozen=True)
class ImageBatches:
    """Batches of ids, (B,) each, and the loader of their pixels."""

    loader: Loader
    ids: Sequence[np.ndarray]

    @property
    def num_batches(self) -> int:
        return len(self.ids)

    def load_pixels(self, index: int) -> np.ndarray:
        """Returns the first view of a batch, (B, S, S, 3) uint8."""
        pixels: np.ndarray = self.loader.load_once(self.ids[index])["views"][:, 0]
        return pixels

    @property
    def max_batch_bytes(self) -> int:
        """Number of bytes of the pixels of the largest batch."""
        return max(map(len, self.ids)) * self.loader.row_bytes


def predict_batches(
    batches: PixelBatches,
    build_network: Callable[[], NetworkFunction],
    pool: ActorPool | None,
    prefetch: int,
    threads: int = 1,
) -> Iterator[np.ndarray]:
    """Yields the (B, ...) answers of the network that `build_network` builds, batch by batch, in order.

    If `pool` is None, the network is built and runs in this process, and `threads` threads decode a batch each.
    `prefetch` batches are decoded ahead of the network; on Ray, ahead of each actor.
    """
    if not batches.num_batches:
        return
    if pool is not None:
        yield from predict_on_actors(
            batches.load_pixels,
            batches.num_batches,
            build_network,
            pool,
            batch_bytes=batches.max_batch_bytes,
            prefetch=prefetch,
        )
        return
    network = build_network()
    loads = ([partial(batches.load_pixels, index)] for index in range(batches.num_batches))
    for (pixels,) in prefetch_items(call_in_threads(loads, threads), prefetch):
        yield network(pixels)
