"""Named augmentations of one image, on the CPU, with PIL and numpy only: the decoding tasks import no torch.

An augmentation is a pure function of (image, random numbers); the random numbers are a pure function of (seed, epoch, id, view). Order of
reading, number of workers and retries therefore cannot change a pixel. A pipeline starts with one crop, which makes the image
`size` x `size`; crops pick their box in the coordinates of the source image and resample once, so an extreme aspect ratio (1 x 5000) never
becomes a huge intermediate image.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Le
from PIL import Image, ImageEnhance

Rng = np.random.Generator
Unit = Annotated[float, Gt(0.0), Le(1.0)]
BILINEAR = Image.Resampling.BILINEAR


def generator(seed: int, epoch: int, image_id: int, view: int) -> Rng:
    """The random numbers of one view of one image in one epoch."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, image_id, view))))


def center_crop(image: Image.Image, rng: Rng, size: int, *, scale: Unit = 1.0) -> Image.Image:
    """The central square whose side is `scale` times the shorter side (0.875: resize to 256, then crop 224)."""
    side = scale * min(image.size)
    return _resized(image, _at(0.5, image.width - side, side == size), _at(0.5, image.height - side, side == size), side, side, size)


def random_crop(image: Image.Image, rng: Rng, size: int, *, scale: Unit = 0.875) -> Image.Image:
    """A square at a random place, its side `scale` times the shorter side (NAT: shorter side to 256, random crop of 224)."""
    side = scale * min(image.size)
    x, y = rng.random(2)
    return _resized(image, _at(x, image.width - side, side == size), _at(y, image.height - side, side == size), side, side, size)


def _at(share: float, free: float, whole: bool) -> float:
    """The place of a box that may move by `free` pixels, `share` of the way; `whole`: on a whole pixel, so that a crop that does not scale copies."""
    return min(float(int(share * (free + 1))), free) if whole else share * free


def random_shift(image: Image.Image, rng: Rng, size: int, *, padding: Annotated[int, Ge(0)] = 4) -> Image.Image:
    """The central square at `size`, padded with black by `padding` pixels, cropped back at a random place (the usual CIFAR crop)."""
    square = center_crop(image, rng, size)
    x, y = rng.integers(0, 2 * padding + 1, size=2)
    shifted = Image.new(square.mode, (size, size))
    shifted.paste(square, (padding - int(x), padding - int(y)))
    return shifted


def random_resized_crop(
    image: Image.Image,
    rng: Rng,
    size: int,
    *,
    scale: tuple[Unit, Unit] = (0.08, 1.0),
    ratio: tuple[Annotated[float, Gt(0.0)], Annotated[float, Gt(0.0)]] = (3 / 4, 4 / 3),
) -> Image.Image:
    """A box of `scale` times the area and an aspect ratio log-uniform in `ratio` (torchvision's RandomResizedCrop)."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return _resized(image, int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h, size)
    w, h = min(width, max(1, round(height * max(ratio)))), min(height, max(1, round(width / min(ratio))))
    return _resized(image, (width - w) / 2, (height - h) / 2, w, h, size)


def horizontal_flip(image: Image.Image, rng: Rng, size: int, *, p: Annotated[float, Ge(0.0), Le(1.0)] = 0.5) -> Image.Image:
    """Mirrored left to right with probability `p`."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < p else image


def random_affine(
    image: Image.Image,
    rng: Rng,
    size: int,
    *,
    degrees: Annotated[float, Ge(0.0), Le(180.0)] = 10.0,
    scale: Annotated[float, Ge(0.0), Le(0.9)] = 0.1,
) -> Image.Image:
    """Turned by up to `degrees` and scaled by 1 +- `scale` about the centre; black outside."""
    angle, zoom = math.radians(rng.uniform(-degrees, degrees)), rng.uniform(1 - scale, 1 + scale)
    a, b, c = math.cos(angle) / zoom, math.sin(angle) / zoom, size / 2
    matrix = (a, b, c - a * c - b * c, -b, a, c + b * c - a * c)
    return image.transform((size, size), Image.Transform.AFFINE, matrix, BILINEAR)


Strength = Annotated[float, Ge(0.0), Le(1.0)]


def color_jitter(
    image: Image.Image,
    rng: Rng,
    size: int,
    *,
    brightness: Strength = 0.4,
    contrast: Strength = 0.4,
    saturation: Strength = 0.4,
    hue: Annotated[float, Ge(0.0), Le(0.5)] = 0.1,
) -> Image.Image:
    """torchvision's ColorJitter: factors uniform in 1 +- strength (hue: a shift in +- `hue` turns), in random order."""
    factors = [1 + rng.uniform(-strength, strength) for strength in (brightness, contrast, saturation)]
    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    shift = rng.uniform(-hue, hue)
    for k in rng.permutation(4):
        if k < 3:
            image = enhancers[k](image).enhance(factors[k])
        elif hue:
            image = _turned(image, shift)
    return image


def _turned(image: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    shifted = (np.asarray(hue, np.int16) + round(255 * turns)) % 256
    return Image.merge("HSV", (Image.fromarray(shifted.astype(np.uint8)), saturation, value)).convert("RGB")


def random_grayscale(image: Image.Image, rng: Rng, size: int, *, p: Annotated[float, Ge(0.0), Le(1.0)] = 0.2) -> Image.Image:
    """Without its colours with probability `p`."""
    return image.convert("L").convert("RGB") if rng.random() < p else image


def _resized(image: Image.Image, left: float, top: float, width: float, height: float, size: int) -> Image.Image:
    # Rounding may push a box over the edge by 1e-13, which PIL refuses.
    box = (max(left, 0.0), max(top, 0.0), min(left + width, image.width), min(top + height, image.height))
    return image.resize((size, size), BILINEAR, box=box)


CROPS: dict[str, Callable[..., Image.Image]] = {
    "center_crop": center_crop,
    "random_crop": random_crop,
    "random_shift": random_shift,
    "random_resized_crop": random_resized_crop,
}
OPS: dict[str, Callable[..., Image.Image]] = {
    **CROPS,
    "horizontal_flip": horizontal_flip,
    "random_affine": random_affine,
    "color_jitter": color_jitter,
    "random_grayscale": random_grayscale,
}


def apply(image: Image.Image, ops: Sequence[Mapping[str, Any]], rng: Rng, size: int) -> np.ndarray:
    """An RGB image of any size -> (size, size, 3) uint8.

    `ops`: mappings `{"op": name, **parameters}`, the form they have in the config.
    """
    for op in ops:
        image = OPS[op["op"]](image, rng, size, **{key: value for key, value in op.items() if key != "op"})
    return np.asarray(image, dtype=np.uint8)
