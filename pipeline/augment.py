"""Named augmentations of one image, on the CPU, with PIL and numpy only: the decoding tasks import no torch.

An augmentation is a pure function of (image, random numbers); the random numbers are a pure function of (seed, epoch, id, view). Order of
reading, number of workers and retries therefore cannot change a pixel. A pipeline starts with one crop, which makes the image
`size` x `size`; crops pick their box in the coordinates of the source image and resample once, so an extreme aspect ratio (1 x 5000) never
becomes a huge intermediate image.

Every op is drawn before it is applied: it looks at random numbers and the size of the image, never at pixels. What is drawn is a row of
numbers that is applied to one image here, with PIL, and to many on a device in `augment_batched`, to the same pixels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from annotated_types import Ge, Gt, Le
from PIL import Image, ImageEnhance

Rng = np.random.Generator
Unit = Annotated[float, Gt(0.0), Le(1.0)]
Strength = Annotated[float, Ge(0.0), Le(1.0)]
Size = tuple[int, int]  # width, height of the source image
BILINEAR = Image.Resampling.BILINEAR


def generator(seed: int, epoch: int, image_id: int, view: int) -> Rng:
    """The random numbers of one view of one image in one epoch."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, image_id, view))))


class Box(NamedTuple):
    """A box of the source image, in its pixels, resampled to `size` x `size`."""

    left: float
    top: float
    width: float
    height: float

    def on(self, image: Image.Image, size: int) -> Image.Image:
        return _resized(image, self.left, self.top, self.width, self.height, size)


class Shift(NamedTuple):
    """A square box of the source image, resampled, then moved to the right and down by whole pixels; black moves in."""

    left: float
    top: float
    side: float
    right: int
    down: int

    def on(self, image: Image.Image, size: int) -> Image.Image:
        square = _resized(image, self.left, self.top, self.side, self.side, size)
        shifted = Image.new(square.mode, (size, size))
        shifted.paste(square, (self.right, self.down))
        return shifted


class Flip(NamedTuple):
    flipped: bool

    def on(self, image: Image.Image, size: int) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flipped else image


class Affine(NamedTuple):
    """Output pixel (x, y) is the input at (a x + b y + c, d x + e y + f); black outside."""

    a: float
    b: float
    c: float
    d: float
    e: float
    f: float

    def on(self, image: Image.Image, size: int) -> Image.Image:
        return image.transform((size, size), Image.Transform.AFFINE, tuple(self), BILINEAR)


class Jitter(NamedTuple):
    """Factors of brightness (0), contrast (1) and saturation (2), and a turn of the hue (3), in the order `first` .. `fourth`."""

    brightness: float
    contrast: float
    saturation: float
    turns: float
    first: int
    second: int
    third: int
    fourth: int

    def on(self, image: Image.Image, size: int) -> Image.Image:
        for k in self[4:]:
            if k < 3:
                image = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[k](image).enhance(self[k])
            elif self.turns:
                image = _turned(image, self.turns)
        return image


class Gray(NamedTuple):
    grayed: bool

    def on(self, image: Image.Image, size: int) -> Image.Image:
        return image.convert("L").convert("RGB") if self.grayed else image


Drawn = Box | Shift | Flip | Affine | Jitter | Gray


def center_crop(rng: Rng, source: Size, size: int, *, scale: Unit = 1.0) -> Box:
    """The central square whose side is `scale` times the shorter side (0.875: resize to 256, then crop 224)."""
    side = scale * min(source)
    return Box(_at(0.5, source[0] - side, side == size), _at(0.5, source[1] - side, side == size), side, side)


def random_crop(rng: Rng, source: Size, size: int, *, scale: Unit = 0.875) -> Box:
    """A square at a random place, its side `scale` times the shorter side (NAT: shorter side to 256, random crop of 224)."""
    side = scale * min(source)
    x, y = rng.random(2).tolist()
    return Box(_at(x, source[0] - side, side == size), _at(y, source[1] - side, side == size), side, side)


def _at(share: float, free: float, whole: bool) -> float:
    """The place of a box that may move by `free` pixels, `share` of the way; `whole`: on a whole pixel, so that a crop that does not scale copies."""
    return min(float(int(share * (free + 1))), free) if whole else share * free


def random_shift(rng: Rng, source: Size, size: int, *, padding: Annotated[int, Ge(0)] = 4) -> Shift:
    """The central square at `size`, padded with black by `padding` pixels, cropped back at a random place (the usual CIFAR crop)."""
    square = center_crop(rng, source, size)
    x, y = rng.integers(0, 2 * padding + 1, size=2).tolist()
    return Shift(square.left, square.top, square.width, padding - x, padding - y)


def random_resized_crop(
    rng: Rng,
    source: Size,
    size: int,
    *,
    scale: tuple[Unit, Unit] = (0.08, 1.0),
    ratio: tuple[Annotated[float, Gt(0.0)], Annotated[float, Gt(0.0)]] = (3 / 4, 4 / 3),
) -> Box:
    """A box of `scale` times the area and an aspect ratio log-uniform in `ratio` (torchvision's RandomResizedCrop)."""
    width, height = source
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h)
    w, h = min(width, max(1, round(height * max(ratio)))), min(height, max(1, round(width / min(ratio))))
    return Box((width - w) / 2, (height - h) / 2, w, h)


def horizontal_flip(rng: Rng, source: Size, size: int, *, p: Annotated[float, Ge(0.0), Le(1.0)] = 0.5) -> Flip:
    """Mirrored left to right with probability `p`."""
    return Flip(rng.random() < p)


def random_affine(
    rng: Rng,
    source: Size,
    size: int,
    *,
    degrees: Annotated[float, Ge(0.0), Le(180.0)] = 10.0,
    scale: Annotated[float, Ge(0.0), Le(0.9)] = 0.1,
) -> Affine:
    """Turned by up to `degrees` and scaled by 1 +- `scale` about the centre; black outside."""
    angle, zoom = math.radians(rng.uniform(-degrees, degrees)), rng.uniform(1 - scale, 1 + scale)
    a, b, c = math.cos(angle) / zoom, math.sin(angle) / zoom, size / 2
    return Affine(a, b, c - a * c - b * c, -b, a, c + b * c - a * c)


def color_jitter(
    rng: Rng,
    source: Size,
    size: int,
    *,
    brightness: Strength = 0.4,
    contrast: Strength = 0.4,
    saturation: Strength = 0.4,
    hue: Annotated[float, Ge(0.0), Le(0.5)] = 0.1,
) -> Jitter:
    """torchvision's ColorJitter: factors uniform in 1 +- strength (hue: a shift in +- `hue` turns), in random order."""
    light, depth, colour = (1 + rng.uniform(-strength, strength) for strength in (brightness, contrast, saturation))
    return Jitter(light, depth, colour, rng.uniform(-hue, hue), *rng.permutation(4).tolist())


def random_grayscale(rng: Rng, source: Size, size: int, *, p: Annotated[float, Ge(0.0), Le(1.0)] = 0.2) -> Gray:
    """Without its colours with probability `p`."""
    return Gray(rng.random() < p)


def _turned(image: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    shifted = (np.asarray(hue, np.int16) + round(255 * turns)) % 256
    return Image.merge("HSV", (Image.fromarray(shifted.astype(np.uint8)), saturation, value)).convert("RGB")


def _resized(image: Image.Image, left: float, top: float, width: float, height: float, size: int) -> Image.Image:
    # Rounding may push a box over the edge by 1e-13, which PIL refuses.
    box = (max(left, 0.0), max(top, 0.0), min(left + width, image.width), min(top + height, image.height))
    return image.resize((size, size), BILINEAR, box=box)


CROPS: dict[str, Callable[..., Drawn]] = {
    "center_crop": center_crop,
    "random_crop": random_crop,
    "random_shift": random_shift,
    "random_resized_crop": random_resized_crop,
}
OPS: dict[str, Callable[..., Drawn]] = {
    **CROPS,
    "horizontal_flip": horizontal_flip,
    "random_affine": random_affine,
    "color_jitter": color_jitter,
    "random_grayscale": random_grayscale,
}


def draw(ops: Sequence[Mapping[str, Any]], rng: Rng, source: Size, size: int) -> list[Drawn]:
    """What `ops` do to an image of the size `source`, one after the other.

    `ops`: mappings `{"op": name, **parameters}`, the form they have in the config.
    """
    return [OPS[op["op"]](rng, source, size, **{key: value for key, value in op.items() if key != "op"}) for op in ops]


def apply(image: Image.Image, ops: Sequence[Mapping[str, Any]], rng: Rng, size: int) -> np.ndarray:
    """An RGB image of any size -> (size, size, 3) uint8; `ops` as for `draw`."""
    for drawn in draw(ops, rng, image.size, size):
        image = drawn.on(image, size)
    return np.asarray(image, dtype=np.uint8)
