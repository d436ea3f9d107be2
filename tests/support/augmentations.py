"""Pipelines of augmentations that use every operation, and their application to one image."""

from typing import Any

import numpy as np
from PIL import Image

from firstlight.pipeline.data.augment.ops import CROP_OPS, OPS, apply_batch, sample_params
from firstlight.pipeline.data.augment.random_numbers import derive_view_keys

CHOSEN = {"corner_crop": {"corner": "top_right"}, "posterize": {"bits": 3}}  # parameters without a default


Ops = list[dict[str, Any]]


CROP: dict[str, Any] = {"op": "center_crop"}


PIPELINES: dict[str, Ops] = {
    **{name: [*([] if name in CROP_OPS else [CROP]), {"op": name, **CHOSEN.get(name, {})}] for name in OPS},
    "a corner at full size": [{"op": "random_crop", "scale": 0.90625}],
    "a random crop in pixels": [{"op": "random_crop", "size": 29}],
    "a central crop in pixels": [{"op": "center_crop", "size": 29}],
    "a corner in pixels": [{"op": "corner_crop", "corner": "bottom_left", "size": 29}],
    "the second window": [{"op": "window_crop", "index": 1, "scale": 0.7}],
    "boxes over the edge": [{"op": "random_resized_crop", "scale": (1.0, 1.0), "ratio": (3.0, 4.0)}],
    "no shift": [{"op": "random_shift", "padding": 0}],
    "shift out of the picture": [{"op": "random_shift", "padding": 40}],
    "far turns": [{"op": "random_shift"}, {"op": "random_affine", "degrees": 180.0, "scale": 0.9}],
    "strong colours": [CROP, {"op": "color_jitter", "brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5}],
    "no hue": [CROP, {"op": "color_jitter", "hue": 0.0}],
    "nothing but hue": [
        CROP,
        {"op": "color_jitter", "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.5},
    ],
    "cifar": [{"op": "random_shift", "padding": 4}, {"op": "horizontal_flip"}],
    "turns a page": [{"op": "random_shift"}, {"op": "vertical_flip"}, {"op": "horizontal_flip"}],
    "seldom colours": [CROP, {"op": "color_jitter", "p": 0.3}],
    "wide blur": [CROP, {"op": "gaussian_blur", "p": 1.0, "sigma": (0.01, 30.0), "kernel_size": 20}],
    "all inverted": [CROP, {"op": "solarize", "p": 1.0, "threshold": 0}],
    "smooth": [CROP, {"op": "sharpness", "p": 0.7, "sharpness_factor": 0.0}],
    "one bit": [CROP, {"op": "posterize", "bits": 1, "p": 1.0}],
    "erased by noise": [CROP, {"op": "random_erasing", "p": 0.8, "value": "noise"}],
    "nothing fits": [CROP, {"op": "random_erasing", "p": 1.0, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}],
    "cut out in pixels": [CROP, {"op": "cutout", "size": 3, "value": "black"}],
    "cut out at random": [CROP, {"op": "cutout", "scale": 0.9, "sizes": "random", "value": "noise", "p": 0.8}],
    "fixmatch": [
        {"op": "random_shift", "padding": 4},
        {"op": "horizontal_flip"},
        {"op": "rand_augment", "pool": "fixmatch", "magnitudes": "random"},
        {"op": "cutout"},
    ],
    "many ops": [CROP, {"op": "rand_augment", "num_ops": 16, "magnitude": 30, "p": 0.9}],
    "simclr": [
        {"op": "random_resized_crop"},
        {"op": "horizontal_flip"},
        {"op": "color_jitter", "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "p": 0.8},
        {"op": "random_grayscale"},
        {"op": "gaussian_blur"},
        {"op": "solarize", "p": 0.2},
    ],
    "super_and": [
        {"op": "random_resized_crop", "scale": (0.2, 1.0)},
        {"op": "color_jitter", "hue": 0.4},
        {"op": "random_grayscale"},
        {"op": "horizontal_flip"},
    ],
}


def make_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Returns an RGB image of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def run_ops(source: Image.Image, ops: Ops, size: int = 16, key: tuple[int, int, int, int] = (0, 0, 0, 0)) -> np.ndarray:
    """Returns the (size, size, 3) view of an image. `key`: seed, pass, id and view."""
    seed, epoch, image_id, view = key
    drawn = sample_params(
        ops, derive_view_keys(seed, np.array([epoch]), np.array([image_id]), view), np.array([source.size]), size
    )
    return next(apply_batch([source], drawn, size))
