"""The folder of a network of timm as timm loads it by its name, with `config.json`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.export_formats import MAP_TOLERANCE, Counterpart, measure_difference
from firstlight.tasks.nn.timm_folder import TimmFolder, write_timm_config


def load_by_name(
    folder: Path, encoder: Encoder, content: Mapping[str, Any], is_right: Callable[[TimmFolder], bool]
) -> tuple[TimmFolder | None, dict[str, Any]]:
    """Writes timm's `config.json` into a folder. Returns the folder as timm loads it by its name, and facts about that.

    They are None and the reason if timm cannot.
    """
    if encoder.input.normalize != "dataset":
        return None, {"not_by_name": "encoder.normalize: image is no mean and standard deviation of all images"}
    try:
        named = write_timm_config(folder, content, is_right)
    except ValueError as error:
        return None, {"not_by_name": str(error)}
    return named, {"gives_maps": named.gives_maps, "channels_last": named.is_channels_last}


def choose_last_map(found: Counterpart, named: TimmFolder) -> Callable[[Tensor], Tensor]:
    """Returns the function that gives the last map of a loaded folder: that of timm where it gives maps."""
    return named.last_map if named.gives_maps else found.last_map(named.network)


@torch.no_grad()
def has_last_map(encoder: Encoder, found: Counterpart, named: TimmFolder) -> bool:
    """Returns True if a loaded folder gives the last map of an encoder, of an image of noise."""
    size = encoder.image_size
    images = torch.rand(1, encoder.image_channels, size, size, generator=torch.Generator().manual_seed(0))
    own, there = encoder(images)[-1], choose_last_map(found, named)(encoder.input(images))
    return there.shape == own.shape and measure_difference(own, there)[1] <= MAP_TOLERANCE
