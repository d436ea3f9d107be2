"""Images augmented on the training device: cached there decoded, or streamed. Batches are bit-identical to `stream`.

Every worker caches all images of the training split, as a batch mixes images from all of it. Each worker decodes a part
and broadcasts it to the others. The cache is kept for later trainings of the process.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from firstlight.pipeline.config.scale import StreamOptions
from firstlight.pipeline.data import stream
from firstlight.pipeline.data.loader import Loader, StoredImages, view_column
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.stream import BatchOrder, EvalOrder, LoadingOptions
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.train import device_augment
from firstlight.tasks.collective import gather_objects, rank, world_size

# Limits of the images that are decoded at a time.
MAX_DECODED_IMAGES, MAX_DECODED_BYTES = 512, 8_000_000


def should_cache(settings: StreamOptions, store: Store, images: int) -> bool:
    """Returns True if the training images, `images` of a store, should be cached on the device.

    Raises:
        UserError: `stream.resident: on` is not possible with these images.
    """
    if settings.resident == "off":
        return False
    obstacle = _find_obstacle(settings, store, images)
    if obstacle and settings.resident == "on":
        raise UserError(f"stream.resident: 'on' is not possible: {obstacle}; valid: auto, off")
    return not obstacle


def explain_streaming(settings: StreamOptions, store: Store, images: int) -> list[str]:
    """Returns a note if `stream.resident: auto` streams the images. `cache_images` returns one if it caches them."""
    obstacle = _find_obstacle(settings, store, images)
    return [f"stream.resident: auto streams the images: {obstacle}"] if settings.resident == "auto" and obstacle else []


def _find_obstacle(settings: StreamOptions, store: Store, images: int) -> str:
    if store.common_size is None:
        return _describe_sizes(store)
    megabytes = images * store.common_size[0] * store.common_size[1] * 3 / 1e6
    if megabytes > settings.resident_mb:
        size = f"{images} images of {store.common_size[0]} x {store.common_size[1]} take {megabytes:,.0f} MB"
        return f"{size}, more than stream.resident_mb: {settings.resident_mb}"
    return ""


def _describe_sizes(store: Store) -> str:
    width, height = (" to ".join(map(str, store.images.get(side, "?"))) for side in ("width", "height"))
    return f"it needs images of one size, these are {width} pixels wide and {height} high"


def should_augment_on_device(settings: StreamOptions, store: Store) -> bool:
    """Returns True if streamed images should be augmented on the training device.

    Raises:
        UserError: `stream.augment: device` is not possible, as the images differ in size.
    """
    if settings.augment == "device" and store.common_size is None:
        raise UserError(f"stream.augment: 'device' is not possible: {_describe_sizes(store)}; valid: cpu")
    return settings.augment == "device"


@dataclass(frozen=True)
class CachedImages:
    """Decoded images on a device.

    ids: (n,) int64, sorted. labels: (n,) int64, -1 if unknown. pixels: (n, 3, H, W) uint8 on the device.
    """

    ids: np.ndarray
    labels: np.ndarray
    pixels: Tensor

    def build_batch(self, ids: np.ndarray, passes: np.ndarray, loader: Loader) -> dict[str, Any]:
        """Returns what `Loader.load` returns, with the views on the device."""
        rows = np.searchsorted(self.ids, ids)
        assert np.array_equal(self.ids[rows], ids)
        images = self.pixels[torch.from_numpy(rows).to(self.pixels.device)]
        views = augment_views(images, ids, passes, loader)
        return {"id": ids, "label": self.labels[rows], "pass": passes, **views}


def augment_views(images: Tensor, ids: np.ndarray, passes: np.ndarray, loader: Loader) -> dict[str, Tensor]:
    """(B, 3, H, W) uint8 -> (B, V, S, S, 3) uint8 for each group of views, computed on the device of `images`.

    The parameters are drawn on the CPU, from the same random numbers as in the stream.
    """
    sizes = np.tile((images.shape[3], images.shape[2]), (len(ids), 1))
    found = {}
    for number, group in enumerate(loader.groups):
        drawn = [loader.sample_params(ids, passes, view, sizes) for view in group]
        views = [device_augment.augment_batch(images, params, loader.size_of(group[0])) for params in drawn]
        found[view_column(number)] = torch.stack(views, 1).permute(0, 1, 3, 4, 2)
    return found


def iterate_cached_batches(
    held: CachedImages, loader: Loader, order: BatchOrder, options: LoadingOptions
) -> Iterator[dict[str, Any]]:
    """Yields the batches of one rank in order. A thread draws parameters and queues the device's work in advance."""
    tasks = (order.list_batches(index) for index in range(len(order)))
    return stream.prefetch_items(
        (held.build_batch(ids, passes, loader) for rows in tasks for ids, passes in rows), options.prefetch
    )


def iterate_streamed_batches(
    loader: Loader, order: BatchOrder, batch_size: int, options: LoadingOptions, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yields the batches of `stream.stream_batches`.

    With `options.on_device`, tasks only decode: an image is transferred once, however many views it has.
    """
    if not options.on_device:
        yield from stream.stream_batches(loader, order, batch_size, options)
        return
    for arrays in stream.stream_batches(_build_decoder(loader), order, batch_size, options):
        images = _move_to_device(device, arrays[view_column(0)])
        yield {**arrays, **augment_views(images, arrays["id"], arrays["pass"], loader)}


def _build_decoder(loader: Loader) -> StoredImages:
    assert loader.store.common_size is not None
    return StoredImages(loader.store, *loader.store.common_size, loader.max_pixels)


def _move_to_device(device: torch.device, views: np.ndarray) -> Tensor:
    """Decoded images (B, 1, H, W, 3) uint8 -> (B, 3, H, W) uint8 on the device."""
    return torch.from_numpy(np.require(views[:, 0], requirements="W")).to(device).permute(0, 3, 1, 2)


# The images that were cached last.
_cache: dict[str, CachedImages] = {}


def cache_images(loader: Loader, options: LoadingOptions, device: torch.device) -> tuple[CachedImages, list[str]]:
    """Returns the images `options.resident` on `device`, and a note if they were decoded for it. Collective."""
    ids, store = options.resident, loader.store
    assert ids is not None
    ids_hash = hashlib.sha256(np.ascontiguousarray(ids).tobytes()).hexdigest()
    key = f"{store.path} {store.hash} {loader.max_pixels} {device} {ids_hash}"
    if all(gather_objects(key in _cache)):
        return _cache[key], []
    # First, so that there are never two of them in memory.
    _cache.clear()
    pixels = _decode_images(loader, ids, options, device)
    _cache[key] = CachedImages(ids, store.labels()[ids], pixels)
    size = f"{pixels.numel() / 1e6:,.1f} MB on {device.type}"
    return _cache[key], [f"{len(ids)} images of {pixels.shape[3]} x {pixels.shape[2]} are held decoded ({size})"]


def _decode_images(loader: Loader, ids: np.ndarray, options: LoadingOptions, device: torch.device) -> Tensor:
    """Returns the images as (n, 3, H, W) uint8 on the device. Each worker decodes a part. Collective."""
    decoder = _build_decoder(loader)
    size = max(1, min(MAX_DECODED_IMAGES, MAX_DECODED_BYTES // decoder.row_bytes))
    pixels = torch.empty(len(ids), 3, decoder.height, decoder.width, dtype=torch.uint8, device=device)
    edges = np.cumsum([0, *(len(part) for part in np.array_split(ids, world_size()))]).tolist()
    done = edges[rank()]
    for arrays in stream.stream_batches(decoder, EvalOrder(ids, size, rank(), world_size()), size, options):
        pixels[done : done + len(arrays["id"])] = _move_to_device(device, arrays[view_column(0)])
        done += len(arrays["id"])
    for source, (start, stop) in enumerate(pairwise(edges)):
        if world_size() > 1 and stop > start:
            dist.broadcast(pixels[start:stop], src=source)
    return pixels
