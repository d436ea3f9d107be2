"""Images that a training holds decoded, or that its device augments. Batches are bit-identical to those of `stream`.

Every worker caches all images of the training split, as a batch mixes images from all of it. Each worker decodes a part
and broadcasts it to the others. The cache is kept for later trainings of the process.

Images of one size are cached on the device and augmented there. Images of several sizes stay in the memory of the
worker's process: they are cropped there, and what a GPU gets are views of one size.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from firstlight.pipeline.data import stream
from firstlight.pipeline.data.augment.compiled.loading import compiled_ops
from firstlight.pipeline.data.augment.compiled.steps import MakeViews, pack_steps
from firstlight.pipeline.data.augment.op_params import OpBatch
from firstlight.pipeline.data.images.pixel_views import PIXEL_BYTES
from firstlight.pipeline.data.images.ragged import RaggedImages
from firstlight.pipeline.data.loader import Arrays, Loader, StoredImages, view_column
from firstlight.pipeline.data.stream import BatchOrder, EvalOrder, LoadingOptions
from firstlight.pipeline.train.device_ops.augment_batch import COLORS, augment_batch
from firstlight.pipeline.train.device_ops.channels import augment_channel_batch
from firstlight.tasks.collective import gather_objects, rank, world_size
from firstlight.tasks.device.copies import send_array
from firstlight.tasks.device.pixel_levels import send_pixels

# Limits of the images that are decoded at a time.
MAX_DECODED_IMAGES, MAX_DECODED_BYTES = 512, 8_000_000
# Pixels of images of several sizes that workers exchange at a time.
MAX_SENT_PIXELS = 1 << 24


def holds_tensors(arrays: dict[str, Any]) -> bool:
    """Returns True if the images of a batch are computed on the training device."""
    return any(isinstance(value, Tensor) for value in arrays.values())


@dataclass(frozen=True)
class CachedImages:
    """Decoded images on a device.

    ids: (n,) int64, sorted. labels: (n,) int64, -1 if unknown. pixels: (n, C, H, W) on the device, uint8, or int16
    with the bits of 16-bit levels. C is 1 for gray images. On a CPU the channels of a pixel lie side by side.
    """

    ids: np.ndarray
    labels: np.ndarray
    pixels: Tensor

    def build_batch(self, ids: np.ndarray, passes: np.ndarray, loader: Loader) -> dict[str, Any]:
        """Returns what `Loader.load` returns, with the views on the device."""
        rows = np.searchsorted(self.ids, ids)
        assert np.array_equal(self.ids[rows], ids)
        views = augment_views(_take_images(self.pixels, rows), ids, passes, loader)
        return {"id": ids, "label": self.labels[rows], "pass": passes, **views}


@dataclass(frozen=True)
class CachedRaggedImages:
    """Decoded images of several sizes in the memory of this process.

    ids: (n,) int64, sorted. labels: (n,) int64, -1 if unknown.
    """

    ids: np.ndarray
    labels: np.ndarray
    images: RaggedImages
    device: torch.device

    def build_batch(self, ids: np.ndarray, passes: np.ndarray, loader: Loader) -> dict[str, Any]:
        """Returns what `Loader.load` returns. On a GPU, what follows the crop of a view is computed there."""
        rows = np.searchsorted(self.ids, ids)
        assert np.array_equal(self.ids[rows], ids)
        opened, labels = [self.images.open_image(row) for row in rows.tolist()], self.labels[rows]
        if self.device.type == "cpu":
            return loader.load_opened(ids, passes, labels, opened)
        return {"id": ids, "label": labels, "pass": passes, **crop_views(opened, ids, passes, loader, self.device)}


def crop_views(
    opened: list[Image.Image], ids: np.ndarray, passes: np.ndarray, loader: Loader, device: torch.device
) -> dict[str, Tensor]:
    """Crops B images of any sizes, and augments them on `device`, to (B, V, S, S, 3) uint8 for each group."""
    return augment_crops(keep_crops(loader).load_opened(ids, passes, ids, opened), loader, device)


def keep_crops(loader: Loader) -> Loader:
    """Returns a loader that does the first op of each view alone, the crop."""
    return replace(loader, ops=tuple(ops[:1] for ops in loader.ops))


def augment_crops(arrays: Arrays, loader: Loader, device: torch.device) -> dict[str, Tensor]:
    """Augments crops of `keep_crops(loader)` on `device`, to (B, V, S, S, 3) uint8 for each group of views."""
    ids, passes, found = arrays["id"], arrays["pass"], {}
    for number, group in enumerate(loader.groups):
        side = loader.size_of(group[0])
        # The transforms after a crop depend on the size of the view alone.
        sizes, views = np.full((len(ids), 2), side), []
        for place, view in enumerate(group):
            images = send_array(arrays[view_column(number)][:, place], device).permute(0, 3, 1, 2)
            views.append(augment_batch(images, loader.sample_params(ids, passes, view, sizes)[1:], side))
        found[view_column(number)] = torch.stack(views, 1).permute(0, 1, 3, 4, 2)
    return found


def augment_views(images: Tensor, ids: np.ndarray, passes: np.ndarray, loader: Loader) -> dict[str, Tensor]:
    """Augments (B, C, H, W) images to (B, V, S, S, C) views of each group, of the same type, on the device of `images`.

    Gray images may have one channel, and their views have three. The parameters are drawn on the CPU, from the same
    random numbers as in the stream.
    """
    sizes = np.tile((images.shape[3], images.shape[2]), (len(ids), 1))
    augment = augment_batch if loader.store.stated_pixels is None else augment_channel_batch
    can_be_compiled = images.device.type == "cpu" and loader.store.stated_pixels is None
    make_views = compiled_ops.find() if can_be_compiled else None
    found = {}
    for number, group in enumerate(loader.groups):
        side, drawn = loader.size_of(group[0]), [loader.sample_params(ids, passes, view, sizes) for view in group]
        if make_views is not None:
            found[view_column(number)] = _compute_views(make_views, images, drawn, side)
            continue
        with compiled_ops.count_time() if can_be_compiled else contextlib.nullcontext():
            views = [augment(images, params, side) for params in drawn]
        found[view_column(number)] = torch.stack(views, 1).permute(0, 1, 3, 4, 2)
    return found


def _compute_views(make_views: MakeViews, images: Tensor, drawn: Sequence[Sequence[OpBatch]], side: int) -> Tensor:
    """Returns the (B, V, side, side, 3) views of (B, C, H, W) images by compiled ops."""
    # They are held so, and are not copied.
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    views = np.empty((len(drawn), len(pixels), side, side, COLORS), np.uint8)
    for params, of_view in zip(drawn, views, strict=True):
        make_views(pixels, *pack_steps(params), of_view)
    return torch.from_numpy(views).transpose(0, 1)


def iterate_cached_batches(
    held: CachedImages | CachedRaggedImages, loader: Loader, order: BatchOrder, options: LoadingOptions
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

    With `options.on_device`, tasks only decode: an image is transferred once, however many views it has. They crop,
    too, if the images differ in size, or take more bytes than their views. A thread draws parameters and queues the
    device's work in advance.
    """
    if not options.on_device:
        return stream.stream_batches(loader, order, batch_size, options)
    if _is_cropped_by_tasks(loader):
        crops = stream.stream_batches(keep_crops(loader), order, batch_size, options)
        batches: Iterator[dict[str, Any]] = ({**arrays, **augment_crops(arrays, loader, device)} for arrays in crops)
    else:
        decoded = stream.stream_batches(_build_decoder(loader), order, batch_size, options)
        batches = (
            {**arrays, **augment_views(_move_to_device(device, arrays, loader), arrays["id"], arrays["pass"], loader)}
            for arrays in decoded
        )
    return stream.prefetch_items(batches, 1)


def _is_cropped_by_tasks(loader: Loader) -> bool:
    if loader.store.stated_pixels is not None:
        return False
    return loader.store.common_size is None or _build_decoder(loader).row_bytes > loader.row_bytes


def _build_decoder(loader: Loader) -> StoredImages:
    assert loader.store.common_size is not None
    return StoredImages(loader.store, *loader.store.common_size, loader.max_pixels)


def _move_to_device(device: torch.device, arrays: Arrays, loader: Loader) -> Tensor:
    """Moves (B, 1, H, W, C) images to the device, as (B, C, H, W) uint8 or int16; gray ones have one channel."""
    images = arrays[view_column(0)][:, 0, :, :, : _count_held_channels(loader)]
    return send_pixels(np.ascontiguousarray(images), device).permute(0, 3, 1, 2)


def _take_images(pixels: Tensor, rows: np.ndarray) -> Tensor:
    """Returns some of (n, C, H, W) images, in the same layout of memory."""
    if pixels.device.type == "cpu":
        return pixels.permute(0, 2, 3, 1)[torch.from_numpy(rows)].permute(0, 3, 1, 2)
    return pixels[send_array(rows, pixels.device)]


def _count_held_channels(loader: Loader) -> int:
    return 1 if loader.store.is_gray else loader.store.pixels.channels


# The images that were cached last.
_cache: dict[str, CachedImages | CachedRaggedImages] = {}


def cache_images(
    loader: Loader, options: LoadingOptions, device: torch.device
) -> tuple[CachedImages | CachedRaggedImages, list[str]]:
    """Returns the images `options.resident` on `device`, and a note if they were decoded for it. It is collective."""
    ids, store = options.resident, loader.store
    assert ids is not None
    ids_hash = hashlib.sha256(np.ascontiguousarray(ids).tobytes()).hexdigest()
    key = f"{store.path} {store.hash} {loader.max_pixels} {device} {ids_hash}"
    if all(gather_objects(key in _cache)):
        return _cache[key], []
    # First, so that there are never two of them in memory.
    _cache.clear()
    labels = store.labels()[ids]
    if store.common_size is None:
        images = _decode_ragged_images(loader, ids, device)
        _cache[key] = CachedRaggedImages(ids, labels, images, device)
        width, height = (f"{side.min()} to {side.max()}" for side in images.sizes.T)
        size = f"{images.num_bytes / 1e6:,.1f} MB in this process"
        return _cache[key], [f"{len(ids)} images of {width} x {height} are held decoded ({size})"]
    pixels = _decode_images(loader, ids, options, device)
    _cache[key] = CachedImages(ids, labels, pixels)
    size = f"{pixels.nbytes / 1e6:,.1f} MB on {device.type}"
    return _cache[key], [f"{len(ids)} images of {pixels.shape[3]} x {pixels.shape[2]} are held decoded ({size})"]


def _decode_ragged_images(loader: Loader, ids: np.ndarray, device: torch.device) -> RaggedImages:
    """Returns images of several sizes. Each worker decodes a part, in its own process. It is collective."""
    parts = np.array_split(ids, world_size())
    decoded = RaggedImages.collect(_iterate_colours(loader, parts[rank()]))
    if world_size() == 1:
        return decoded
    sizes: list[np.ndarray] = gather_objects(decoded.sizes)
    buffer, stop = np.empty((sum(int(part.prod(1).sum()) for part in sizes), PIXEL_BYTES), np.uint8), 0
    for source, of_part in enumerate(sizes):
        start, stop = stop, stop + int(of_part.prod(1).sum())
        if source == rank():
            _move_pixels(decoded, buffer[start:stop])
        for place in range(start, stop, MAX_SENT_PIXELS):
            _broadcast_pixels(buffer[place : min(place + MAX_SENT_PIXELS, stop)], source, device)
    return RaggedImages.split_buffer(buffer, np.concatenate(sizes))


def _iterate_colours(loader: Loader, ids: np.ndarray) -> Iterator[Image.Image]:
    for image in loader.iterate_images(ids):
        assert isinstance(image, Image.Image), "images with their channels as they are are held in one size only"
        yield image


def _move_pixels(images: RaggedImages, buffer: np.ndarray) -> None:
    """Moves images to a buffer, one after the other; each is freed when it was copied."""
    place = 0
    for number, pixels in enumerate(images.pixels):
        buffer[place : place + pixels.size // PIXEL_BYTES] = pixels.reshape(-1, PIXEL_BYTES)
        place += pixels.size // PIXEL_BYTES
        images.pixels[number] = buffer[:0].reshape(0, 0, PIXEL_BYTES)


def _broadcast_pixels(pixels: np.ndarray, source: int, device: torch.device) -> None:
    """Sets pixels to those of the worker `source`. A GPU's workers exchange tensors of their devices only."""
    sent = torch.from_numpy(pixels).to(device)
    dist.broadcast(sent, src=source)
    if device.type != "cpu":
        pixels[:] = sent.cpu().numpy()


def _decode_images(loader: Loader, ids: np.ndarray, options: LoadingOptions, device: torch.device) -> Tensor:
    """Returns the images as (n, C, H, W) uint8 or int16 on the device. Each worker decodes a part. It is collective."""
    decoder = _build_decoder(loader)
    size = max(1, min(MAX_DECODED_IMAGES, MAX_DECODED_BYTES // decoder.row_bytes))
    channels, dtype = _count_held_channels(loader), torch.uint8 if loader.store.pixels.bits == 8 else torch.int16
    shape, layout = (len(ids), channels, decoder.height, decoder.width), torch.contiguous_format
    if device.type == "cpu":
        layout = torch.channels_last
    pixels = torch.empty(shape, dtype=dtype, device=device, memory_format=layout)
    edges = np.cumsum([0, *(len(part) for part in np.array_split(ids, world_size()))]).tolist()
    done = edges[rank()]
    for arrays in stream.stream_batches(decoder, EvalOrder(ids, size, rank(), world_size()), size, options):
        pixels[done : done + len(arrays["id"])] = _move_to_device(device, arrays, loader)
        done += len(arrays["id"])
    for source, (start, stop) in enumerate(pairwise(edges)):
        if world_size() > 1 and stop > start:
            sent = pixels[start:stop].permute(0, 2, 3, 1) if device.type == "cpu" else pixels[start:stop]
            # Some backends do not send int16.
            dist.broadcast(sent.view(torch.uint8), src=source)
    return pixels
