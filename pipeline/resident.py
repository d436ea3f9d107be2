"""Images held decoded on the training device and augmented there, batch by batch: ids, labels and pixels are those of `stream`.

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

from pipeline import augment, augment_batched, stream
from pipeline.errors import UserError
from pipeline.store import Store
from pipeline.stream import Decoder, EvalOrder, Loader, Options, Order
from tasks.collective import gather_objects, rank, world

if TYPE_CHECKING:
    from pipeline.config import Stream

BATCH, BATCH_BYTES = 512, 8_000_000  # images decoded at a time, at most
# Ray Data takes seconds to start, and then decodes beside the training; what is held starts at once, and shares the training's process. With
# `resident: auto`, trainings that see no more images than this hold theirs.
SHORT = 50_000


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


def _obstacle(settings: "Stream", store: Store, images: int) -> str:
    if store.size is None:
        width, height = (" to ".join(map(str, store.images.get(side, "?"))) for side in ("width", "height"))
        return f"it needs images of one size, these are {width} pixels wide and {height} high"
    megabytes = images * store.size[0] * store.size[1] * 3 / 1e6
    if megabytes > settings.resident_mb:
        return f"{images} images of {store.size[0]} x {store.size[1]} take {megabytes:,.0f} MB, more than stream.resident_mb: {settings.resident_mb}"
    return ""


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
        views = [augment_batched.apply(images, self._drawn(ids, passes, view, loader), loader.size) for view in range(len(loader.ops))]
        return {"id": ids, "label": self.labels[rows], "views": torch.stack(views, 1).permute(0, 1, 3, 4, 2)}

    def _drawn(self, ids: np.ndarray, passes: np.ndarray, view: int, loader: Loader) -> list[list[augment.Drawn]]:
        """What is done to each image; drawn on the CPU, by the numbers that the stream draws by."""
        source, ops = (self.pixels.shape[3], self.pixels.shape[2]), loader.ops[view]
        turns = zip(ids.tolist(), passes.tolist(), strict=True)
        return [augment.draw(ops, augment.generator(loader.seed, turn, i, view), source, loader.size) for i, turn in turns]


def batches(held: Held, loader: Loader, order: Order, options: Options) -> Iterator[dict[str, Any]]:
    """The batches of one rank, in order, made ahead by a thread: numbers are drawn, and work is handed to the device, beside the training step."""
    tasks = (order.task(index) for index in range(len(order)))
    return stream.prefetched((held.batch(ids, passes, loader) for rows in tasks for ids, passes in rows), options.prefetch)


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
    return _kept[key], [f"{len(ids)} images of {pixels.shape[3]} x {pixels.shape[2]} are held decoded ({megabytes:,.1f} MB on {device.type})"]


def _decoded(loader: Loader, ids: np.ndarray, options: Options, device: torch.device) -> Tensor:
    """(n, 3, H, W) uint8, each part decoded by one worker."""
    assert loader.store.size is not None
    width, height = loader.store.size
    decoder = Decoder(loader.store, width, height, loader.max_pixels)
    size = max(1, min(BATCH, BATCH_BYTES // decoder.row_bytes))
    pixels = torch.empty(len(ids), 3, height, width, dtype=torch.uint8, device=device)
    edges = np.cumsum([0, *(len(part) for part in np.array_split(ids, world()))]).tolist()
    done = edges[rank()]
    for arrays in stream.batches(decoder, EvalOrder(ids, size, rank(), world()), size, options):
        views = torch.from_numpy(np.require(arrays["views"][:, 0], requirements="W"))
        pixels[done : done + len(views)] = views.permute(0, 3, 1, 2).to(device)
        done += len(views)
    for source, (start, stop) in enumerate(pairwise(edges)):
        if world() > 1 and stop > start:
            dist.broadcast(pixels[start:stop], src=source)
    return pixels
