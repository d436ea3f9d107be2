"""Decides what is black and what is white in images of more than 8 bits, for a whole store."""

from collections.abc import Mapping
from typing import Any

from firstlight.pipeline.data.images.levels import LevelCounts, decide_level_range, find_level_kind
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError


def decide_levels(counts: Mapping[str, LevelCounts], depth: int | None, old: Store | None) -> dict[str, Any]:
    """Returns the entry `levels` of a manifest: black, white and what was found, by kind of levels.

    `counts`: the levels of all images. `depth`: `dataset.depth`. Images of `old`, the store that is extended, keep
    their range.

    Raises:
        UserError: new images have levels beyond that range, or `depth` gives another one.
    """
    found = {}
    for kind, of_kind in sorted(counts.items()):
        black, white = decide_level_range(kind, of_kind.low, of_kind.high, depth)
        if old is not None and kind in old.levels:
            black, white = _keep_range(kind, of_kind, (black, white), depth, old)
        elif old is not None and kind in {str(find_level_kind(mode)) for mode in old.images.get("modes", {})}:
            # The earlier store was written without ranges: each of its images has its own.
            continue
        found[kind] = {
            "black": black,
            "white": white,
            "lowest": of_kind.low,
            "highest": of_kind.high,
            "images": of_kind.images,
            "dark": of_kind.count_dark(black, white),
            "flat": of_kind.count_flat(black, white),
        }
    return found


def _keep_range(
    kind: str, counts: LevelCounts, wanted: tuple[float, float], depth: int | None, old: Store
) -> tuple[float, float]:
    black, white = old.levels[kind]
    if counts.low < black or counts.high > white or (depth is not None and wanted != (black, white)):
        raise UserError(
            f"dataset.extends: the images of {kind} have levels {counts.low:,.10g} to {counts.high:,.10g}, and those "
            f"of {old.path} are read with {black:,.10g} as black and {white:,.10g} as white; valid: the same range, or "
            "a new store without dataset.extends"
        )
    return black, white
