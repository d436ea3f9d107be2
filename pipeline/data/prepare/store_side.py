"""The largest shorter side of the images of a store, in pixels: `dataset.store_size`."""

import math
from collections.abc import Iterable
from typing import Any

from firstlight.pipeline.data.prepare.header_probe import iterate_headers
from firstlight.pipeline.data.sources import Source
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError

# `auto`: at least this many times the side of a view.
AUTO_SIDE_RATIO = 2.0
# The largest factor by which the smallest crop may be enlarged.
MAX_ENLARGEMENT = 1.125
# `auto` is a multiple of this, so that recipes that differ a little share a store.
AUTO_SIDE_STEP = 32
# Images whose headers are looked at: in so many places of the training split, so many in a row.
PROBED_PLACES, PROBED_IN_A_ROW = 4, 16
# Annotations that count in pixels of their image.
PIXEL_ANNOTATIONS = ("boxes", "mask")


def find_auto_side(views: Iterable[tuple[dict[str, Any], int]]) -> int | None:
    """Returns the side that `auto` stands for, None if images must keep their size.

    `views`: the crop of each view, as `sample_params` takes it, and the side of the view in pixels. Crops that are
    given in pixels of the image need the image as it is.
    """
    sides = []
    for crop, size in views:
        if crop.get("size") is not None:
            return None
        sides.append(max(AUTO_SIDE_RATIO, 1 / (_find_least_share(crop) * MAX_ENLARGEMENT)) * size)
    return AUTO_SIDE_STEP * math.ceil(max(sides) / AUTO_SIDE_STEP - 1e-9) if sides else None


def _find_least_share(crop: dict[str, Any]) -> float:
    """Returns the side of the smallest crop as a share of the shorter side of a square image."""
    scale = crop.get("scale")
    return math.sqrt(scale[0]) if isinstance(scale, tuple | list) else float(scale or 1.0)


def choose_store_side(wanted: int | str, auto_side: int | None, source: Source) -> int | None:
    """Returns the side of a new store of `source`; None: its images are stored as they are.

    `wanted`: `dataset.store_size`. `auto_side`: as `find_auto_side`. `auto` leaves sources alone that seem to have no
    larger image, and those with boxes or masks.

    Raises:
        UserError: a side is stated and the source has boxes or masks.
    """
    known = [name for name in source.annotations if name in PIXEL_ANNOTATIONS]
    if isinstance(wanted, int):
        if known:
            raise UserError(
                f"dataset.store_size: {wanted} is not valid with {' and '.join(known)}, which count in pixels of the "
                "images as they are; valid: auto, off"
            )
        return wanted
    if wanted == "off" or auto_side is None or known:
        return None
    return auto_side if has_larger_images(source, auto_side) else None


def has_larger_images(source: Source, side: int) -> bool:
    """Returns True if one of some training images has more than `side` pixels on its shorter side.

    Only headers are decoded. The images are the same for the same source: the answer names a folder.
    """
    total = source.splits.get("train", 0)
    starts = range(0, total, max(total // PROBED_PLACES, PROBED_IN_A_ROW))
    return any(min(header.frame.upright) > side for header in iterate_headers(source, starts, PROBED_IN_A_ROW))


def keep_store_side(wanted: int | str, old: Store) -> int | None:
    """Returns the side of a store that extends `old`: the same.

    Raises:
        UserError: another one is stated.
    """
    known: int | str = old.store_side or "off"
    if wanted not in ("auto", known):
        raise UserError(
            f"dataset.store_size: {wanted!r} is not that of the extended store {old.path}; valid: auto, {known}"
        )
    return old.store_side
