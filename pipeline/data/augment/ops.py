"""Named augmentations, on the CPU, without torch, which the decoding tasks do not import.

An augmentation is a pure function of (image, random numbers). The random numbers are a pure function of (seed, pass,
id, view), the index of the op in its list, and the index of the number among those of the op (`random_numbers`). The
order of reading, the number of workers and retries therefore cannot change a pixel. A pipeline starts with one crop
(`crops`), which makes the image `size` x `size`.

The parameters of an op are sampled for all images of a batch at once, before it is applied: an op depends on random
numbers and on the sizes of the images, never on pixels.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import permutations
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le
from PIL import Image

from firstlight.pipeline.data.augment.compiled.loading import compiled_ops
from firstlight.pipeline.data.augment.compiled.steps import pack_steps
from firstlight.pipeline.data.augment.crops import (
    center_crop,
    corner_crop,
    count_windows,
    fit_inside,
    random_crop,
    random_resized_crop,
    random_shift,
    scale_uniform,
    stack_params,
    window_crop,
)
from firstlight.pipeline.data.augment.op_params import (
    Affine,
    Flip,
    Grayscale,
    Jitter,
    OpBatch,
    OpParams,
    VerticalFlip,
)
from firstlight.pipeline.data.augment.pixel_ops import (
    Probability,
    autocontrast,
    cutout,
    equalize,
    gaussian_blur,
    posterize,
    random_erasing,
    sharpness,
    solarize,
)
from firstlight.pipeline.data.augment.policies import rand_augment, trivial_augment
from firstlight.pipeline.data.augment.random_numbers import CounterRng
from firstlight.pipeline.data.channels.channel_image import ChannelImage
from firstlight.pipeline.data.channels.channel_ops import apply_channel_ops
from firstlight.pipeline.data.channels.pixel_format import RGB_PIXELS
from firstlight.pipeline.data.images.pixel_views import view_pixels

Strength = Annotated[float, Ge(0.0), Le(1.0)]
# The (24, 4) orders of the four changes of color_jitter.
JITTER_ORDERS = np.array(list(permutations(range(4))), np.float64)
# Larger images are left to Pillow, which copies no pixel of them: to decode them takes much longer.
MAX_COMPILED_PIXELS = 2**22


# Each op takes a generator, the (B, 2) widths and heights of the source images, and the side of the result. Its
# keyword-only parameters are its parameters in a recipe.


def horizontal_flip(rng: CounterRng, sources: np.ndarray, output_side: int, *, p: Probability = 0.5) -> OpBatch:
    """Mirrors the image left to right with probability `p`."""
    return stack_params(Flip, rng.uniform(1)[:, 0] < p)


def vertical_flip(rng: CounterRng, sources: np.ndarray, output_side: int, *, p: Probability = 0.5) -> OpBatch:
    """Mirrors the image top to bottom with probability `p`."""
    return stack_params(VerticalFlip, rng.uniform(1)[:, 0] < p)


def random_affine(
    rng: CounterRng,
    sources: np.ndarray,
    output_side: int,
    *,
    degrees: Annotated[float, Ge(0.0), Le(180.0)] = 10.0,
    scale: Annotated[float, Ge(0.0), Le(0.9)] = 0.1,
) -> OpBatch:
    """Rotates by up to `degrees` and scales by 1 +- `scale` about the centre; black outside."""
    turn, grow = rng.uniform(2).T
    angle, zoom = np.radians(scale_uniform(turn, -degrees, degrees)), scale_uniform(grow, 1 - scale, 1 + scale)
    a, b, c = np.cos(angle) / zoom, np.sin(angle) / zoom, output_side / 2
    return stack_params(Affine, a, b, c - a * c - b * c, -b, a, c + b * c - a * c)


def color_jitter(
    rng: CounterRng,
    sources: np.ndarray,
    output_side: int,
    *,
    brightness: Strength = 0.4,
    contrast: Strength = 0.4,
    saturation: Strength = 0.4,
    hue: Annotated[float, Ge(0.0), Le(0.5)] = 0.1,
    p: Probability = 1.0,
) -> OpBatch:
    """Changes brightness, contrast, saturation and hue in random order (torchvision's ColorJitter).

    `brightness`: its factor is uniform in 1 +- this strength.
    `contrast`: its factor is uniform in 1 +- this strength.
    `saturation`: its factor is uniform in 1 +- this strength.
    `hue`: the hue is shifted by up to this many turns.
    `p`: the probability that a view is changed at all (SimCLR: 0.8).
    """
    drawn = rng.uniform(6)
    strength, neutral = np.array((brightness, contrast, saturation, hue)), np.array((1.0, 1.0, 1.0, 0.0))
    changes = np.where(drawn[:, 5:] < p, neutral + scale_uniform(drawn[:, :4], -strength, strength), neutral)
    return OpBatch(Jitter, np.hstack((changes, JITTER_ORDERS[(drawn[:, 4] * len(JITTER_ORDERS)).astype(np.int64)])))


def random_grayscale(rng: CounterRng, sources: np.ndarray, output_side: int, *, p: Probability = 0.2) -> OpBatch:
    """Makes the image grey with probability `p`."""
    return stack_params(Grayscale, rng.uniform(1)[:, 0] < p)


CROP_OPS: dict[str, Callable[..., OpBatch]] = {
    "center_crop": center_crop,
    "corner_crop": corner_crop,
    "fit": fit_inside,
    "random_crop": random_crop,
    "random_shift": random_shift,
    "random_resized_crop": random_resized_crop,
    "window_crop": window_crop,
}
OPS: dict[str, Callable[..., OpBatch]] = {
    **CROP_OPS,
    "horizontal_flip": horizontal_flip,
    "vertical_flip": vertical_flip,
    "random_affine": random_affine,
    "color_jitter": color_jitter,
    "random_grayscale": random_grayscale,
    "gaussian_blur": gaussian_blur,
    "solarize": solarize,
    "posterize": posterize,
    "equalize": equalize,
    "autocontrast": autocontrast,
    "sharpness": sharpness,
    "random_erasing": random_erasing,
    "cutout": cutout,
    "rand_augment": rand_augment,
    "trivial_augment": trivial_augment,
}


def list_ten_crops(scale: float | None = None, size: int | None = None) -> tuple[tuple[dict[str, Any], ...], ...]:
    """Returns ten lists of ops: four corners and the centre, then their mirror images (torchvision's TenCrop).

    `scale` and `size` are those of `corner_crop`.
    """
    corners = ("top_left", "top_right", "bottom_left", "bottom_right", "center")
    # The top left of a mirrored image was its top right.
    mirrored = ("top_right", "top_left", "bottom_right", "bottom_left", "center")
    crops = [{"op": "corner_crop", "corner": corner, "scale": scale, "size": size} for corner in (*corners, *mirrored)]
    return tuple(
        (crop,) if k < len(corners) else (crop, {"op": "horizontal_flip", "p": 1.0}) for k, crop in enumerate(crops)
    )


def list_windows(
    sizes: np.ndarray, scale: float | None = None, size: int | None = None
) -> tuple[tuple[dict[str, Any], ...], ...]:
    """Returns lists of ops: the windows that cover each of (n, 2) images, as many as the one that takes most.

    `scale` and `size` are those of `window_crop`.
    """
    most = int(count_windows(sizes, scale, size).prod(1).max(initial=1))
    return tuple(({"op": "window_crop", "index": k, "scale": scale, "size": size},) for k in range(most))


def sample_params(ops: Sequence[Mapping[str, Any]], keys: np.ndarray, sources: np.ndarray, size: int) -> list[OpBatch]:
    """Samples the parameters of each of `ops`, which are applied one after the other, for the images of a batch.

    `ops`: mappings `{"op": name, **parameters}`, as in a recipe; `keys`: (B,) uint64 of `derive_view_keys`; `sources`:
    (B, 2) widths and heights of the images.
    """
    return [
        OPS[op["op"]](CounterRng(keys, index), sources, size, **{k: v for k, v in op.items() if k != "op"})
        for index, op in enumerate(ops)
    ]


def apply_params(image: Image.Image | ChannelImage, params: Sequence[OpParams], size: int) -> np.ndarray:
    """Applies the ops' parameters to an image of any size.

    Returns (size, size, 3) uint8 of an RGB image, and (size, size, C) of the type of an image of C channels.
    """
    if isinstance(image, ChannelImage):
        return apply_channel_ops(image, params, size)
    for op in params:
        image = op.apply_to(image, size)
    return np.asarray(image, dtype=np.uint8)


def apply_batch(
    images: Sequence[Image.Image | ChannelImage], ops: Sequence[OpBatch], size: int
) -> Iterator[np.ndarray]:
    """Applies the ops' parameters to images of any sizes. Yields what `apply_params` returns, one after another.

    A process that makes many views makes most of them by compiled ops, with the same pixels.
    """
    make_views = compiled_ops.find()
    if make_views is None or not images:
        for image, params in zip(images, zip(*(op.params_per_image() for op in ops), strict=True), strict=True):
            with compiled_ops.count_time() if isinstance(image, Image.Image) else contextlib.nullcontext():
                pixels = apply_params(image, params, size)
            yield pixels
        return
    numbers, weights = pack_steps(ops)
    for k, image in enumerate(images):
        if isinstance(image, ChannelImage) or image.width * image.height > MAX_COMPILED_PIXELS:
            yield apply_params(image, [op.kind(*op.rows[k].tolist()) for op in ops], size)
            continue
        view = np.empty((1, size, size, RGB_PIXELS.channels), np.uint8)
        make_views(view_pixels(image)[None], numbers[k : k + 1], weights[k : k + 1], view)
        yield view[0]
