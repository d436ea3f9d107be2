"""Pipelines of augmentations that use every operation."""

from typing import Any

from firstlight.pipeline.data.augment.ops import CROP_OPS, OPS

CHOSEN = {"corner_crop": {"corner": "top_right"}}  # parameters without a default


Ops = list[dict[str, Any]]


CROP: dict[str, Any] = {"op": "center_crop"}


PIPELINES: dict[str, Ops] = {
    **{name: [{"op": name, **CHOSEN.get(name, {})}] if name in CROP_OPS else [CROP, {"op": name}] for name in OPS},
    "a corner at full size": [{"op": "random_crop", "scale": 0.90625}],
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
    "super_and": [
        {"op": "random_resized_crop", "scale": (0.2, 1.0)},
        {"op": "color_jitter", "hue": 0.4},
        {"op": "random_grayscale"},
        {"op": "horizontal_flip"},
    ],
}
