"""Augmentations of the two views of an image (SimCLR: Chen et al. 2020, appendix A; BYOL: Grill et al. 2020)."""

from collections.abc import Mapping
from typing import Any

# The side in pixels below which nothing is blurred: SimCLR, appendix B.9, leaves the blur out on CIFAR-10.
SMALL_IMAGE_SIDE = 64
# Both views of SimCLR have this probability of a blur.
SIMCLR_BLUR = (0.5, 0.5)
# The probabilities in BYOL's first view and in its second (appendix B, table 6).
BYOL_BLUR, BYOL_SOLARIZE = (1.0, 0.1), (0.0, 0.2)
# BYOL's jitter of colours (appendix B, table 6), which VICReg has, too.
BYOL_JITTER: dict[str, float] = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
PAIR_GRAYSCALE = 0.2


def compose_byol_ops(
    augment: tuple[Mapping[str, Any], ...], image_size: int
) -> tuple[tuple[Mapping[str, Any], ...], tuple[Mapping[str, Any], ...]]:
    """Returns the augmentations of the two views of BYOL (Grill et al. 2020, table 6), as `compose_pair_ops`."""
    return compose_pair_ops(augment, image_size, BYOL_JITTER, BYOL_BLUR, BYOL_SOLARIZE)


def compose_pair_ops(
    augment: tuple[Mapping[str, Any], ...],
    image_size: int,
    jitter: Mapping[str, float],
    blur: tuple[float, float],
    solarize: tuple[float, float] = (0.0, 0.0),
) -> tuple[tuple[Mapping[str, Any], ...], tuple[Mapping[str, Any], ...]]:
    """Returns the augmentations of the first view and of the second.

    The ops of `augment` stay. The ops that it lacks are added after them: jitter of colours, grey images, and on images
    of SMALL_IMAGE_SIDE pixels or more blur and solarisation.

    Args:
        augment: the augmentations of training images, the crop first.
        image_size: the side of a view in pixels.
        jitter: the parameters of `color_jitter`.
        blur: the probability of a blur in each view.
        solarize: the probability of solarisation in each view.
    """
    given = {op["op"] for op in augment}
    first, second = (
        (
            *augment,
            *(op for op in _list_added_ops(image_size, jitter, blur[view], solarize[view]) if op["op"] not in given),
        )
        for view in (0, 1)
    )
    return first, second


def list_colour_ops(jitter: Mapping[str, float]) -> list[Mapping[str, Any]]:
    """Returns the changes of colour that these methods have: jitter with the given parameters, and grey images."""
    return [{"op": "color_jitter", **jitter, "p": 0.8}, {"op": "random_grayscale", "p": PAIR_GRAYSCALE}]


def _list_added_ops(
    image_size: int, jitter: Mapping[str, float], blur: float, solarize: float
) -> list[Mapping[str, Any]]:
    ops = list_colour_ops(jitter)
    if image_size >= SMALL_IMAGE_SIDE:
        ops += [{"op": "gaussian_blur", "p": blur}] if blur else []
        ops += [{"op": "solarize", "p": solarize}] if solarize else []
    return ops
