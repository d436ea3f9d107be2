"""Fills in `encoder.mean` and `encoder.std` where they are null: those of the training images or a saved encoder."""

from collections.abc import Mapping, Sequence
from typing import Any

from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.channels.channel_image import ChannelImage
from firstlight.pipeline.data.images.colours import Colours, ColourSums
from firstlight.pipeline.data.splits import select_evenly_spaced
from firstlight.pipeline.data.store import Store

COLOUR_KEYS = ("mean", "std")
# Images of a store whose manifest does not have their colours, as that of an earlier version.
MAX_MEASURED_IMAGES = 256


def fill_input_colours(recipe: Recipe, store: Store, saved: Sequence[Mapping[str, Any]]) -> Recipe:
    """Returns the recipe with numbers in place of nulls. `saved`: the specs of encoders that its stages start from."""
    encoder = recipe.network_spec
    missing = [key for key in COLOUR_KEYS if encoder[key] is None]
    if not missing or encoder["normalize"] == "image":
        return recipe
    colours: Mapping[str, Any] = saved[0] if saved else measure_colours(store, recipe.dataset.max_pixels)._asdict()
    raw = recipe.dump()
    return parse_recipe({**raw, "encoder": {**raw["encoder"], **{key: list(colours[key]) for key in missing}}})


def measure_colours(store: Store, max_pixels: int) -> Colours:
    """Returns the colours of the training images, as counted when they were prepared."""
    sums = ColourSums()
    if "colours" in store.images:
        sums.merge_sums(store.images["colours"])
    if sums.images < store.splits["train"]:
        sums = ColourSums()
        images, _ = store.read(select_evenly_spaced(store.ids("train"), MAX_MEASURED_IMAGES))
        for data in images:
            image = store.open_image(data, max_pixels)
            if isinstance(image, ChannelImage):
                sums.add_levels(image.values, store.pixels.white)
            else:
                sums.add_image(image)
    return sums.compute_colours(store.pixels.white)
