"""Images augmented on the training device, batch by batch: held there decoded, or as they come. Ids, labels and pixels are those of `stream`.

Every worker holds all images of the training split, as they are stored: a batch mixes images from all over it. The workers decode a part each
and hand it to the others. What is held stays for the process's next trainings.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from firstlight.pipeline.data import stream
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.stream import Decoder, EvalOrder, Loader, Options, Order
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.train import device_augment
from firstlight.tasks.collective import gather_objects, rank, world

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import Stream

BATCH, BATCH_BYTES = 512, 8_000_000  # images decoded at a time, at most


def possible(settings: "Stream", store: Store, images: int) -> bool:
    """Whether `images` of a store are to be held.

    Raises:
        UserError: `stream.resident: on`, and they cannot be.
    """
    if settings.resident == "off":
        return False
    obstacle = _obstacle(settings, store, images)
    if obstacle and settings.resident == "on":
        raise UserError(f"stream.resident: 'on' is not possible: {obstacle}; valid: auto, off")
    return not obstacle


def choice(settings: "Stream", store: Store, images: int) -> list[str]:
    """A line for the user where `stream.resident: auto` does not hold `images` of a store; what is held is told by `hold`."""
    obstacle = _obstacle(settings, store, images)
    return [f"stream.resident: auto streams the images: {obstacle}"] if settings.resident == "auto" and obstacle else []


def _obstacle(settings: "Stream", store: Store, images: int) -> str:
    if store.size is None:
        return _sizes(store)
    megabytes = images * store.size[0] * store.size[1] * 3 / 1e6
    if megabytes > settings.resident_mb:
        return f"{images} images of {store.size[0]} x {store.size[1]} take {megabytes:,.0f} MB, more than stream.resident_mb: {settings.resident_mb}"
    return ""


def _sizes(store: Store) -> str:
    width, height = (" to ".join(map(str, store.images.get(side, "?"))) for side in ("width", "height"))
    return f"it needs images of one size, these are {width} pixels wide and {height} high"


def on_device(settings: "Stream", store: Store) -> bool:
    """Whether images that are streamed are augmented on the training device.

    Raises:
        UserError: `stream.augment: device`, and the images differ in size.
    """
    if settings.augment == "device" and store.size is None:
        raise UserError(f"stream.augment: 'device' is not possible: {_sizes(store)}; valid: cpu")
    return settings.augment == "device"


@dataclass(frozen=True)
class Held:
    """Decoded images on a device."""

    ids: np.ndarray  # (n,) int64, sorted
    labels: np.ndarray  # (n,) int64, -1 = unknown
    pixels: Tensor  # (n, 3, H, W) uint8

    def batch(self, ids: np.ndarray, passes: np.ndarray, loader: Loader) -> dict[str, Any]:
        """As `Loader.load`, the views (B, V, S, S, 3) on the device."""
        rows = np.searchsorted(self.ids, ids)
        assert np.array_equal(self.ids[rows], ids)
        images = self.pixels[torch.from_numpy(rows).to(self.pixels.device)]
        return {"id": ids, "label": self.labels[rows], "views": augmented(images, ids, passes, loader)}


def augmented(images: Tensor, ids: np.ndarray, passes: np.ndarray, loader: Loader) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, V, S, S, 3), all views on the device; drawn on the CPU, by the numbers that the stream draws by."""
    sizes = np.tile((images.shape[3], images.shape[2]), (len(ids), 1))
    drawn = [loader.draw(ids, passes, view, sizes) for view in range(len(loader.ops))]
    return torch.stack([device_augment.apply(images, view, loader.size) for view in drawn], 1).permute(0, 1, 3, 4, 2)


def batches(held: Held, loader: Loader, order: Order, options: Options) -> Iterator[dict[str, Any]]:
    """The batches of one rank, in order, made ahead by a thread: numbers are drawn, and work is handed to the device, beside the training step."""
    tasks = (order.task(index) for index in range(len(order)))
    return stream.prefetched(
        (held.batch(ids, passes, loader) for rows in tasks for ids, passes in rows), options.prefetch
    )


def streamed(
    loader: Loader, order: Order, batch_size: int, options: Options, device: torch.device
) -> Iterator[dict[str, Any]]:
    """As `stream.batches`. With `options.on_device`, tasks only decode, and an image travels once however many views it has."""
    if not options.on_device:
        yield from stream.batches(loader, order, batch_size, options)
        return
    passes = (turns for index in range(len(order)) for _, turns in order.task(index))
    for turns, arrays in zip(passes, stream.batches(_decoder(loader), order, batch_size, options), strict=True):
        images = _on(device, arrays["views"])
        yield {"id": arrays["id"], "label": arrays["label"], "views": augmented(images, arrays["id"], turns, loader)}


def _decoder(loader: Loader) -> Decoder:
    assert loader.store.size is not None
    return Decoder(loader.store, *loader.store.size, loader.max_pixels)


def _on(device: torch.device, views: np.ndarray) -> Tensor:
    """What a `Decoder` gave, (B, 1, H, W, 3) -> (B, 3, H, W) on the device."""
    return torch.from_numpy(np.require(views[:, 0], requirements="W")).to(device).permute(0, 3, 1, 2)


_kept: dict[str, Held] = {}  # the last one


def hold(loader: Loader, options: Options, device: torch.device) -> tuple[Held, list[str]]:
    """The images of the ids in `options.resident` on `device`, and what the user should know: of those that were decoded for it. Collective."""
    ids, store = options.resident, loader.store
    assert ids is not None
    key = f"{store.path} {store.hash} {loader.max_pixels} {device} {hashlib.sha256(np.ascontiguousarray(ids).tobytes()).hexdigest()}"
    if all(gather_objects(key in _kept)):
        return _kept[key], []
    _kept.clear()  # before there are two of them
    pixels = _decoded(loader, ids, options, device)
    _kept[key] = Held(ids, store.labels()[ids], pixels)
    megabytes = pixels.numel() / 1e6
    return _kept[key], [
        f"{len(ids)} images of {pixels.shape[3]} x {pixels.shape[2]} are held decoded ({megabytes:,.1f} MB on {device.type})"
    ]


def _decoded(loader: Loader, ids: np.ndarray, options: Options, device: torch.device) -> Tensor:
    """(n, 3, H, W) uint8, each part decoded by one worker."""
    decoder = _decoder(loader)
    size = max(1, min(BATCH, BATCH_BYTES // decoder.row_bytes))
    pixels = torch.empty(len(ids), 3, decoder.height, decoder.width, dtype=torch.uint8, device=device)
    edges = np.cumsum([0, *(len(part) for part in np.array_split(ids, world()))]).tolist()
    done = edges[rank()]
    for arrays in stream.batches(decoder, EvalOrder(ids, size, rank(), world()), size, options):
        pixels[done : done + len(arrays["id"])] = _on(device, arrays["views"])
        done += len(arrays["id"])
    for source, (start, stop) in enumerate(pairwise(edges)):
        if world() > 1 and stop > start:
            dist.broadcast(pixels[start:stop], src=source)
    return pixels
