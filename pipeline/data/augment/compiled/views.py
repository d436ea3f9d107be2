"""The views of images: the ops that were drawn for each, one after the other, in one call of machine code."""

import numpy as np

from firstlight.pipeline.data.augment.compiled.colors import change_color, make_gray
from firstlight.pipeline.data.augment.compiled.compiler import compiled
from firstlight.pipeline.data.augment.compiled.filters import blur_planes, sharpen_planes
from firstlight.pipeline.data.augment.compiled.geometry import (
    erase_box,
    flip_planes,
    flip_planes_vertically,
    place_planes,
    warp_planes,
)
from firstlight.pipeline.data.augment.compiled.levels import (
    equalize_planes,
    posterize_planes,
    solarize_planes,
    stretch_planes,
)
from firstlight.pipeline.data.augment.compiled.resampling import resample_planes
from firstlight.pipeline.data.augment.compiled.steps import (
    AFFINE_STEP,
    AUTO_CONTRAST_STEP,
    BLUR_STEP,
    CROP_BOX_STEP,
    EQUALIZE_STEP,
    ERASE_STEP,
    FIT_STEP,
    FLIP_STEP,
    GRAYSCALE_STEP,
    JITTER_STEP,
    POSTERIZE_STEP,
    SHARPNESS_STEP,
    SHIFT_STEP,
    SOLARIZE_STEP,
    VERTICAL_FLIP_STEP,
)
from firstlight.pipeline.data.augment.pixel_params import NO_THRESHOLD


@compiled
def crop_planes(pixels: np.ndarray, steps: np.ndarray, side: int) -> np.ndarray:
    """Returns the (side, 3, side) planes of the crop that a list of steps begins with."""
    kind, first, second = int(steps[0, 0]), steps[0, 1], steps[0, 2]
    if kind == FIT_STEP:
        left, top, width, height = 0.0, 0.0, first, second
        x, y, across, down = int(steps[0, 3]), int(steps[0, 4]), int(steps[0, 5]), int(steps[0, 6])
    else:
        left, top, width, height = first, second, steps[0, 3], steps[0, 3 if kind == SHIFT_STEP else 4]
        x, y, across, down = 0, 0, side, side
        if kind == SHIFT_STEP:
            x, y = int(steps[0, 4]), int(steps[0, 5])
    found = resample_planes(pixels, left, top, width, height, across, down)
    return found if kind == CROP_BOX_STEP else place_planes(found, x, y, side)


@compiled
def change_planes(steps: np.ndarray, k: int, weights: np.ndarray, planes: np.ndarray) -> None:
    """Applies step `k` of those after the crop, unless it changes nothing."""
    kind, number = int(steps[k, 0]), steps[k, 1]
    if kind == FLIP_STEP:
        if number != 0.0:
            flip_planes(planes)
    elif kind == VERTICAL_FLIP_STEP:
        if number != 0.0:
            flip_planes_vertically(planes)
    elif kind == AFFINE_STEP:
        warp_planes(planes, number, steps[k, 2], steps[k, 3], steps[k, 4], steps[k, 5], steps[k, 6])
    elif kind == JITTER_STEP:
        for place in range(4, 8):
            change = int(steps[k, 1 + place])
            change_color(planes, change, steps[k, 1 + change])
    elif kind == GRAYSCALE_STEP:
        if number != 0.0:
            make_gray(planes)
    elif kind == BLUR_STEP:
        if number != 0.0:
            blur_planes(planes, weights, k, int(steps[k, 2]))
    elif kind == SOLARIZE_STEP:
        if number < NO_THRESHOLD:
            solarize_planes(planes, int(np.ceil(number)))
    elif kind == POSTERIZE_STEP:
        if number < 8.0:
            posterize_planes(planes, int(number))
    elif kind == EQUALIZE_STEP:
        if number != 0.0:
            equalize_planes(planes)
    elif kind == AUTO_CONTRAST_STEP:
        if number != 0.0:
            stretch_planes(planes)
    elif kind == SHARPNESS_STEP:
        if number != 1.0:
            sharpen_planes(planes, np.float32(number))
    elif kind == ERASE_STEP:
        erase_box(
            planes, int(number), int(steps[k, 2]), int(steps[k, 3]), int(steps[k, 4]), int(steps[k, 5]), steps[k, 6]
        )


def make_views(pixels: np.ndarray, steps: np.ndarray, weights: np.ndarray, views: np.ndarray) -> None:
    """Makes (B, S, S, 3) uint8 `views` of (B, H, W, C) uint8 images, gray if C is 1; a fourth channel is ignored.

    `steps` and `weights`: those of `Steps`.
    """
    side = views.shape[1]
    for image in range(len(views)):
        own, view = steps[image], views[image]
        planes = crop_planes(pixels[image], own, side)
        for k in range(1, len(own)):
            if own[k, 0] >= 0.0:
                change_planes(own, k, weights[image], planes)
        for y in range(side):
            for x in range(side):
                view[y, x, 0], view[y, x, 1], view[y, x, 2] = planes[y, 0, x], planes[y, 1, x], planes[y, 2, x]
