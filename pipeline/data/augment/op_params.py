"""The parameters that an augmentation op has for one image, and their application with PIL.

`train.device_ops.augment_batch` applies the same parameters to many images at a time on a device, with the same pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance

from firstlight.pipeline.data.augment.pixel_params import (
    AutoContrast,
    Blur,
    Equalize,
    Erase,
    Posterize,
    Sharpness,
    Solarize,
)

BILINEAR = Image.Resampling.BILINEAR


class CropBox(NamedTuple):
    """A box of the source image, in its pixels, resampled to `size` x `size`."""

    left: float
    top: float
    width: float
    height: float

    def apply_to(self, image: Image.Image, size: int) -> Image.Image:
        return _resize_box(image, self.left, self.top, self.width, self.height, size)


class Shift(NamedTuple):
    """A square box of the source image, resampled, then moved right and down by whole pixels; black fills the gap."""

    left: float
    top: float
    side: float
    right: float
    down: float

    def apply_to(self, image: Image.Image, size: int) -> Image.Image:
        square = _resize_box(image, self.left, self.top, self.side, self.side, size)
        shifted = Image.new(square.mode, (size, size))
        shifted.paste(square, (int(self.right), int(self.down)))
        return shifted


class Fit(NamedTuple):
    """The whole image of `across` x `down` pixels, resampled to `width` x `height`, on black at (left, top)."""

    across: float
    down: float
    left: float
    top: float
    width: float
    height: float

    def apply_to(self, image: Image.Image, size: int) -> Image.Image:
        canvas = Image.new(image.mode, (size, size))
        canvas.paste(image.resize((int(self.width), int(self.height)), BILINEAR), (int(self.left), int(self.top)))
        return canvas


class Flip(NamedTuple):
    """A mirror image, left to right, if `flipped` is 1."""

    flipped: float

    def apply_to(self, image: Image.Image, size: int) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flipped else image


class VerticalFlip(NamedTuple):
    """A mirror image, top to bottom, if `flipped` is 1."""

    flipped: float

    def apply_to(self, image: Image.Image, size: int) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if self.flipped else image


class Affine(NamedTuple):
    """An affine map: output pixel (x, y) is the input at (a x + b y + c, d x + e y + f); black outside."""

    a: float
    b: float
    c: float
    d: float
    e: float
    f: float

    def apply_to(self, image: Image.Image, size: int) -> Image.Image:
        return image.transform((size, size), Image.Transform.AFFINE, tuple(self), BILINEAR)


class Jitter(NamedTuple):
    """Factors of brightness (0), contrast (1) and saturation (2), and a hue shift in turns (3).

    They are applied in the order `first` .. `fourth`.
    """

    brightness: float
    contrast: float
    saturation: float
    turns: float
    first: float
    second: float
    third: float
    fourth: float

    def apply_to(self, image: Image.Image, size: int) -> Image.Image:
        for k in map(int, self[4:]):
            if k < 3 and self[k] != 1.0:
                image = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[k](image).enhance(self[k])
            elif k == 3 and self.turns:
                image = _rotate_hue(image, self.turns)
        return image


class Grayscale(NamedTuple):
    """A grey image if `grayed` is 1."""

    grayed: float

    def apply_to(self, image: Image.Image, size: int) -> Image.Image:
        return image.convert("L").convert("RGB") if self.grayed else image


class Policy:
    """Ops that were chosen for one image, applied one after the other.

    Its numbers are POLICY_STEP_WIDTH for each op: the place of its kind in POLICY_KINDS, or NO_OP, and its parameters.
    """

    def __init__(self, *numbers: float) -> None:
        starts = range(0, len(numbers), POLICY_STEP_WIDTH)
        self.steps = tuple(_build_step(numbers[k : k + POLICY_STEP_WIDTH]) for k in starts if numbers[k] != NO_OP)

    def apply_to(self, image: Image.Image, size: int) -> Image.Image:
        for step in self.steps:
            image = step.apply_to(image, size)
        return image


PolicyStep = Affine | Jitter | Sharpness | Posterize | Solarize | Equalize | AutoContrast
POLICY_KINDS: tuple[type[PolicyStep], ...] = (
    Affine,
    Jitter,
    Sharpness,
    Posterize,
    Solarize,
    Equalize,
    AutoContrast,
)
NO_OP = -1
POLICY_STEP_WIDTH = 1 + max(len(kind._fields) for kind in POLICY_KINDS)
OpParams = (CropBox | Shift | Fit | Flip | VerticalFlip | Affine | Jitter | Grayscale | Blur | Solarize | Posterize) | (
    Equalize | AutoContrast | Sharpness | Erase | Policy
)


def _build_step(numbers: Sequence[float]) -> PolicyStep:
    kind = POLICY_KINDS[int(numbers[0])]
    return kind(*numbers[1 : 1 + len(kind._fields)])


@dataclass(frozen=True)
class OpBatch:
    """The parameters of one op for each image of a batch."""

    kind: type[OpParams]
    # (B, k) float64, each row the fields of a `kind`.
    rows: np.ndarray

    def params_per_image(self) -> list[OpParams]:
        return [self.kind(*row) for row in self.rows.tolist()]


def _rotate_hue(image: Image.Image, turns: float) -> Image.Image:
    levels = np.array(image.convert("HSV"))
    # Levels of 8 bits go around, as hues do.
    levels[..., 0] += np.uint8(round(255 * turns) % 256)
    return Image.fromarray(levels, "HSV").convert("RGB")


def _resize_box(image: Image.Image, left: float, top: float, width: float, height: float, size: int) -> Image.Image:
    # Rounding may push a box over the edge by 1e-13, which PIL refuses.
    box = (max(left, 0.0), max(top, 0.0), min(left + width, image.width), min(top + height, image.height))
    return image.resize((size, size), BILINEAR, box=box)
