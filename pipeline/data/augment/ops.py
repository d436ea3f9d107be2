"""Named augmentations, on the CPU, with PIL and numpy only: the decoding tasks import no torch.

An augmentation is a pure function of (image, random numbers); the random numbers are a pure function of (seed, epoch, id, view), the place of
the op in its list, and the place of the number among those of the op (`draws`). Order of reading, number of workers and retries therefore
cannot change a pixel. A pipeline starts with one crop, which makes the image `size` x `size`; crops pick their box in the coordinates of the
source image and resample once, so an extreme aspect ratio (1 x 5000) never becomes a huge intermediate image.

Every op is drawn before it is applied, for all images of a batch at once: it looks at random numbers and the sizes of the images, never at
pixels. What is drawn for an image is a row of numbers. Rows are applied one by one here, with PIL, and many at a time on a device in
`augment_batched`, to the same pixels.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge, Gt, Le
from PIL import Image, ImageEnhance

from firstlight.pipeline.data.augment.random_numbers import Numbers

Unit = Annotated[float, Gt(0.0), Le(1.0)]
Strength = Annotated[float, Ge(0.0), Le(1.0)]
Corner = Literal["center", "top_left", "top_right", "bottom_left", "bottom_right"]
BILINEAR = Image.Resampling.BILINEAR
TRIES = 10  # boxes that are drawn for a random resized crop; the first that fits is taken
ORDERS = np.array(list(permutations(range(4))), np.float64)  # (24, 4)


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
    right: float
    down: float

    def on(self, image: Image.Image, size: int) -> Image.Image:
        square = _resized(image, self.left, self.top, self.side, self.side, size)
        shifted = Image.new(square.mode, (size, size))
        shifted.paste(square, (int(self.right), int(self.down)))
        return shifted


class Fit(NamedTuple):
    """The whole image, `across` x `down` pixels, resampled to whole `width` x `height`, and laid on black at whole (left, top)."""

    across: float
    down: float
    left: float
    top: float
    width: float
    height: float

    def on(self, image: Image.Image, size: int) -> Image.Image:
        canvas = Image.new(image.mode, (size, size))
        canvas.paste(image.resize((int(self.width), int(self.height)), BILINEAR), (int(self.left), int(self.top)))
        return canvas


class Flip(NamedTuple):
    flipped: float  # 0 or 1

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
    first: float
    second: float
    third: float
    fourth: float

    def on(self, image: Image.Image, size: int) -> Image.Image:
        for k in map(int, self[4:]):
            if k < 3:
                image = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[k](image).enhance(self[k])
            elif self.turns:
                image = _turned(image, self.turns)
        return image


class Gray(NamedTuple):
    grayed: float  # 0 or 1

    def on(self, image: Image.Image, size: int) -> Image.Image:
        return image.convert("L").convert("RGB") if self.grayed else image


Row = Box | Shift | Fit | Flip | Affine | Jitter | Gray


@dataclass(frozen=True)
class Drawn:
    """What one op does to each image of a batch."""

    kind: type[Row]
    rows: np.ndarray  # (B, k) float64, each the fields of a `kind`

    def each(self) -> list[Row]:
        return [self.kind(*row) for row in self.rows.tolist()]


def _drawn(kind: type[Row], *columns: np.ndarray) -> Drawn:
    rows = np.empty((len(columns[0]), len(columns)))
    for k, column in enumerate(columns):
        rows[:, k] = column
    return Drawn(kind, rows)


# Each op is called with the numbers it draws by, the (B, 2) widths and heights of the source images, and the size of the result. Its
# keyword-only parameters are those that it has in a recipe.


def center_crop(numbers: Numbers, sources: np.ndarray, size: int, *, scale: Unit = 1.0) -> Drawn:
    """The central square whose side is `scale` times the shorter side (0.875: resize to 256, then crop 224)."""
    return _square(sources, size, scale, np.array([0.5, 0.5]))


def random_crop(numbers: Numbers, sources: np.ndarray, size: int, *, scale: Unit = 0.875) -> Drawn:
    """A square at a random place, its side `scale` times the shorter side (NAT: shorter side to 256, random crop of 224)."""
    return _square(sources, size, scale, numbers.uniform(2))


def corner_crop(numbers: Numbers, sources: np.ndarray, size: int, *, corner: Corner, scale: Unit = 0.875) -> Drawn:
    """The square in a corner, or in the centre, whose side is `scale` times the shorter side."""
    right, down = (0.5, 0.5) if corner == "center" else (float("right" in corner), float("bottom" in corner))
    return _square(sources, size, scale, np.array([right, down]))


def _square(sources: np.ndarray, size: int, scale: float, place: np.ndarray) -> Drawn:
    """`place`: (B, 2) or (2,), the shares of the way right and down that the square has gone.

    On whole pixels where it keeps its size, so that a crop that does not scale copies.
    """
    side = scale * sources.min(1, keepdims=True)
    free = sources - side
    corner = np.where(side == size, np.minimum(np.floor(place * (free + 1)), free), place * free)
    return Drawn(Box, np.hstack((corner, side, side)))


def fit(numbers: Numbers, sources: np.ndarray, size: int) -> Drawn:
    """The whole image, as large as it fits, in the middle of black: for boxes and masks, of which none should be cut away."""
    sides = np.maximum(1, np.rint(sources * (size / sources.max(1, keepdims=True))))
    return Drawn(Fit, np.hstack((sources, np.floor((size - sides) / 2), sides)))


def random_shift(numbers: Numbers, sources: np.ndarray, size: int, *, padding: Annotated[int, Ge(0)] = 4) -> Drawn:
    """The central square at `size`, padded with black by `padding` pixels, cropped back at a random place (the usual CIFAR crop)."""
    square = center_crop(numbers, sources, size).rows[:, :3]
    return Drawn(Shift, np.hstack((square, padding - np.floor(numbers.uniform(2) * (2 * padding + 1)))))


def random_resized_crop(
    numbers: Numbers,
    sources: np.ndarray,
    size: int,
    *,
    scale: tuple[Unit, Unit] = (0.08, 1.0),
    ratio: tuple[Annotated[float, Gt(0.0)], Annotated[float, Gt(0.0)]] = (3 / 4, 4 / 3),
) -> Drawn:
    """A box of `scale` times the area and an aspect ratio log-uniform in `ratio` (torchvision's RandomResizedCrop)."""
    width, height = sources.T.astype(np.float64)
    drawn = numbers.uniform(2 + 2 * TRIES)
    area = (width * height)[:, None] * _between(drawn[:, 2 : 2 + TRIES], *scale)
    aspect = np.exp(_between(drawn[:, 2 + TRIES :], math.log(ratio[0]), math.log(ratio[1])))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    first = fits.argmax(1)[:, None]
    any_fits = fits.any(1)
    # Where none fits, the largest central one of the nearest ratio
    w = np.where(
        any_fits, np.take_along_axis(w, first, 1)[:, 0], np.minimum(width, np.maximum(1, np.rint(height * max(ratio))))
    )
    h = np.where(
        any_fits, np.take_along_axis(h, first, 1)[:, 0], np.minimum(height, np.maximum(1, np.rint(width / min(ratio))))
    )
    left, top = (
        np.where(any_fits, np.floor(u * (free + 1)), free / 2)
        for u, free in ((drawn[:, 0], width - w), (drawn[:, 1], height - h))
    )
    return _drawn(Box, left, top, w, h)


def horizontal_flip(
    numbers: Numbers, sources: np.ndarray, size: int, *, p: Annotated[float, Ge(0.0), Le(1.0)] = 0.5
) -> Drawn:
    """Mirrored left to right with probability `p`."""
    return _drawn(Flip, numbers.uniform(1)[:, 0] < p)


def random_affine(
    numbers: Numbers,
    sources: np.ndarray,
    size: int,
    *,
    degrees: Annotated[float, Ge(0.0), Le(180.0)] = 10.0,
    scale: Annotated[float, Ge(0.0), Le(0.9)] = 0.1,
) -> Drawn:
    """Turned by up to `degrees` and scaled by 1 +- `scale` about the centre; black outside."""
    turn, grow = numbers.uniform(2).T
    angle, zoom = np.radians(_between(turn, -degrees, degrees)), _between(grow, 1 - scale, 1 + scale)
    a, b, c = np.cos(angle) / zoom, np.sin(angle) / zoom, size / 2
    return _drawn(Affine, a, b, c - a * c - b * c, -b, a, c + b * c - a * c)


def color_jitter(
    numbers: Numbers,
    sources: np.ndarray,
    size: int,
    *,
    brightness: Strength = 0.4,
    contrast: Strength = 0.4,
    saturation: Strength = 0.4,
    hue: Annotated[float, Ge(0.0), Le(0.5)] = 0.1,
) -> Drawn:
    """torchvision's ColorJitter: factors uniform in 1 +- strength (hue: a shift in +- `hue` turns), in random order."""
    drawn = numbers.uniform(5)
    strength = np.array((brightness, contrast, saturation, hue))
    changes = np.array((1.0, 1.0, 1.0, 0.0)) + _between(drawn[:, :4], -strength, strength)
    return Drawn(Jitter, np.hstack((changes, ORDERS[(drawn[:, 4] * len(ORDERS)).astype(np.int64)])))


def random_grayscale(
    numbers: Numbers, sources: np.ndarray, size: int, *, p: Annotated[float, Ge(0.0), Le(1.0)] = 0.2
) -> Drawn:
    """Without its colours with probability `p`."""
    return _drawn(Gray, numbers.uniform(1)[:, 0] < p)


def _between(share: np.ndarray, low: Any, high: Any) -> np.ndarray:
    numbers: np.ndarray = low + (high - low) * share
    return numbers


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
    "corner_crop": corner_crop,
    "fit": fit,
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


def ten_crop(scale: float = 0.875) -> tuple[tuple[dict[str, Any], ...], ...]:
    """Ten lists of ops: the four corners and the centre, then their mirror images, in the order of torchvision's TenCrop."""
    corners = ("top_left", "top_right", "bottom_left", "bottom_right", "center")
    mirrored = (
        "top_right",
        "top_left",
        "bottom_right",
        "bottom_left",
        "center",
    )  # the top left of a mirrored image was its top right
    crops = [{"op": "corner_crop", "corner": corner, "scale": scale} for corner in (*corners, *mirrored)]
    return tuple(
        (crop,) if k < len(corners) else (crop, {"op": "horizontal_flip", "p": 1.0}) for k, crop in enumerate(crops)
    )


def draw(ops: Sequence[Mapping[str, Any]], keys: np.ndarray, sources: np.ndarray, size: int) -> list[Drawn]:
    """What each of `ops`, one after the other, does to the images of a batch.

    `ops`: mappings `{"op": name, **parameters}`, the form they have in the config; `keys`: (B,) uint64, as `draws.keys` gives; `sources`: (B, 2)
    widths and heights of the images.
    """
    return [
        OPS[op["op"]](Numbers(keys, place), sources, size, **{k: v for k, v in op.items() if k != "op"})
        for place, op in enumerate(ops)
    ]


def apply(image: Image.Image, rows: Sequence[Row], size: int) -> np.ndarray:
    """An RGB image of any size and what each op does to it -> (size, size, 3) uint8."""
    for row in rows:
        image = row.on(image, size)
    return np.asarray(image, dtype=np.uint8)


def apply_each(images: Sequence[Image.Image], drawn: Sequence[Drawn], size: int) -> Iterator[np.ndarray]:
    """RGB images of any sizes and what each op does to them -> (size, size, 3) uint8, one after the other."""
    for image, rows in zip(images, zip(*(op.each() for op in drawn), strict=True), strict=True):
        yield apply(image, rows, size)
