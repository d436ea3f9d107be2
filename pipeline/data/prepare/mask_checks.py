"""Checks the masks of a whole store: void must not hide a class, and there must be something to learn."""

from collections.abc import Mapping

from firstlight.pipeline.data.images.class_maps import VOID_VALUE
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError

# The share of all pixels from which on void may be a class that was saved as 255.
SUSPICIOUS_VOID_SHARE = 0.1


def check_masks(store: Store, mask_values: Mapping[str, tuple[int | str, ...]]) -> None:
    """Checks that what occurs in the training masks is what the classes say, unless `dataset.mask_values` states it.

    Raises:
        UserError: much is void and a class never occurs, or some is void and fewer than two classes occur: both are
            so in masks of 0 and 255.
    """
    pixels = store.images.get("annotated", {}).get("train", {}).get("pixels")
    if not pixels or mask_values:
        return
    void = pixels.get(str(VOID_VALUE), 0) / sum(pixels.values())
    absent = [(k, name) for k, name in enumerate(store.classes) if not pixels.get(str(k))]
    num_occurring = len(store.classes) - len(absent)
    is_suspicious = num_occurring < 2 if void < SUSPICIOUS_VOID_SHARE else bool(absent) or num_occurring < 2
    if void == 0.0 or not is_suspicious:
        return
    number, name = absent[0] if absent else (1, "another")
    occurring = "".join(f"{known}: {k}, " for k, known in enumerate(store.classes) if pixels.get(str(k)))
    never = f"class {number} ({name!r}) never occurs" if absent else f"{store.classes[0]!r} is the only class"
    raise UserError(
        f"dataset.mask_values: {void:.1%} of the pixels of the training masks are {VOID_VALUE}, which is void, and "
        f"{never}; valid, if {VOID_VALUE} is a class: {{{occurring}{name}: {VOID_VALUE}}}, and if it is void: "
        f"{{{occurring}{name}: {number}, void: {VOID_VALUE}}}"
    )
