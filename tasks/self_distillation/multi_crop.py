"""Augmentations of large and small crops (multi-crop: SwAV, Caron et al. 2020, section 3.2; DINO, section 3.1)."""

from collections.abc import Mapping
from typing import Any

from firstlight.tasks.joint_embedding.pair_ops import BYOL_JITTER, SMALL_IMAGE_SIDE, list_colour_ops

# The share of the image's area that a large and a small crop have (DINO's code).
GLOBAL_SCALE = (0.4, 1.0)
LOCAL_SCALE = (0.05, 0.4)
# The scale of small crops of images below SMALL_IMAGE_SIDE pixels: smaller crops would have next to no pixels, and a
# blur would leave nothing to see.
SMALL_LOCAL_SCALE = (0.2, 0.4)
# The side of a small crop as a share of the image's: 96 of 224 pixels (DINO, section 3.1).
LOCAL_SIDE_SHARE = 96 / 224
# The probability of a blur in the first and the second large crop and in small ones, and that of solarisation in the
# second large crop (DINO's code, after BYOL).
BLUR_PROBABILITIES = (1.0, 0.1, 0.5)
SOLARIZE_PROBABILITY = 0.2


def choose_local_side(image_size: int) -> int:
    """Returns the side of small crops in pixels: a multiple of 16, or of 4 for images below 32 pixels.

    It is 96 for images of 224 pixels, 32 for 64, and 16 for 32: patches of a ViT fit into it.
    """
    step = 16 if image_size >= 32 else 4
    return max(step, round(LOCAL_SIDE_SHARE * image_size / step) * step)


def compose_crop_ops(
    augment: tuple[Mapping[str, Any], ...], image_size: int
) -> tuple[tuple[Mapping[str, Any], ...], ...]:
    """Returns the augmentations of the first large crop, of the second, and of small crops.

    The crop of `augment` becomes a random resized crop of the kind's scale. Its other ops stay, and the paper's are
    added where it lacks them: jitter of colours and grey images, and a blur on images of SMALL_IMAGE_SIDE pixels or
    more; solarisation in the second large crop.

    Args:
        augment: the augmentations of training images, the crop first.
        image_size: the side of a large crop in pixels.
    """
    crop, *others = augment
    given = {op["op"] for op in others}
    kept = [*others, *(op for op in list_colour_ops(BYOL_JITTER) if op["op"] not in given)]
    is_small = image_size < SMALL_IMAGE_SIDE
    scales = (GLOBAL_SCALE, GLOBAL_SCALE, SMALL_LOCAL_SCALE if is_small else LOCAL_SCALE)
    found = []
    for kind, (scale, blur) in enumerate(zip(scales, BLUR_PROBABILITIES, strict=True)):
        base = crop if crop["op"] == "random_resized_crop" else {"op": "random_resized_crop"}
        ops: list[Mapping[str, Any]] = [{**base, "scale": scale}, *kept]
        if not is_small and "gaussian_blur" not in given:
            ops.append({"op": "gaussian_blur", "p": blur})
        if kind == 1 and "solarize" not in given:
            ops.append({"op": "solarize", "p": SOLARIZE_PROBABILITY})
        found.append(tuple(ops))
    return tuple(found)
