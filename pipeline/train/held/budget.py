"""The number of decoded images that a worker keeps in memory: `stream.resident` and `stream.resident_mb`."""

import math

import numpy as np

from firstlight.pipeline.config.scale import AUTO, StreamOptions
from firstlight.pipeline.data.image_statistics import last_in_bin
from firstlight.pipeline.data.images.pixel_views import PIXEL_BYTES
from firstlight.pipeline.data.plan import TrainingPlan
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.stream import LoadingOptions
from firstlight.pipeline.errors import UserError


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
    held = estimate_held_bytes(store, images)
    if held is None and store.stated_pixels:
        return f"images of {store.pixels} (dataset.channels) differ in size"
    if held is None:
        return "the store does not say how large its images are"
    if held / 1e6 > settings.resident_mb:
        width, height = _describe_ranges(store)
        size = f"{images} images of {width} x {height} take {held / 1e6:,.0f} MB"
        return f"{size}, more than stream.resident_mb: {settings.resident_mb}"
    return ""


def _describe_ranges(store: Store) -> list[str]:
    """Returns the widths and the heights of the images of a store, as text."""
    return [" to ".join(map(str, dict.fromkeys(store.images.get(side, "?")))) for side in ("width", "height")]


def estimate_held_bytes(store: Store, images: int) -> int | None:
    """Returns the bytes that `images` images of a store take decoded, None if it does not say how large they are.

    Images of several sizes are known by bins of a quarter of an octave, whose upper ends count, and are taken to be
    like those of the whole store.
    """
    if store.common_size is not None:
        # Gray images are held with one channel.
        pixel_bytes = 1 if store.is_gray else store.pixels.pixel_bytes
        return int(images * store.common_size[0] * store.common_size[1] * pixel_bytes)
    # Images of several sizes can be held only if their mode is RGB.
    found: list[list[int]] = [] if store.stated_pixels else store.images.get("sizes", [])
    widest, highest = (int(store.images.get(side, (0, 0))[1]) for side in ("width", "height"))
    if not found:
        return None
    pixels = [
        count * min(last_in_bin(across), widest) * min(last_in_bin(down), highest) for across, down, count in found
    ]
    return math.ceil(images * PIXEL_BYTES * sum(pixels) / sum(count for *_, count in found))


def divide_held_bytes(settings: StreamOptions, store: Store, images: int) -> tuple[int, int]:
    """Returns the largest numbers of bytes of images of several sizes that a training may hold, and of views that are
    held outside of trainings: both together are at most `resident_mb`.

    `images`: the number of training images.
    """
    limit = 0 if settings.resident == "off" else settings.resident_mb * 1_000_000
    held = estimate_held_bytes(store, images)
    if held is None or held > limit:
        return limit // 2, limit // 2
    return held, limit - held


def choose_held_ids(store: Store, options: LoadingOptions, plan: TrainingPlan) -> np.ndarray | None:
    """Returns the sorted ids of the images that a training holds decoded, None if it streams its images.

    `plan`: the order of the images that it trains on. Images of several sizes are decoded one by one, so that a
    training on few of them holds these alone; it may hold them where all images would be too many.
    """
    resident = options.resident
    if store.common_size is not None or (resident is not None and 2 * plan.num_ids > len(resident)):
        return resident
    held = estimate_held_bytes(store, plan.num_ids)
    return np.unique(plan.ids) if held is not None and held <= options.held_bytes else resident


def should_augment_on_device(settings: StreamOptions, store: Store, on_gpu: bool) -> bool:
    """Returns True if streamed images should be augmented on the training device, after their crop if they differ in
    size.

    Raises:
        UserError: `stream.augment: device` is not possible with these images.
    """
    is_rgb = store.stated_pixels is None
    if settings.augment == "device" and store.common_size is None and not is_rgb:
        width, height = _describe_ranges(store)
        sizes = f"images of {store.pixels} need one size, these are {width} pixels wide and {height} high"
        raise UserError(f"stream.augment: 'device' is not possible: {sizes}; valid: auto, cpu")
    return settings.augment == "device" or (settings.augment == AUTO and on_gpu and is_rgb)
