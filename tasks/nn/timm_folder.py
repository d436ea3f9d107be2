"""Folders that `timm.create_model("local-dir:<folder>", pretrained=True)` loads, and that a hub can serve."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.library_backbones import first_line

TIMM_CONFIG_FILE = "config.json"
# The arguments by which timm builds a network without a classifier, in the order in which they are tried. Where its
# network has layers after the last map, which have no weights here, timm can give the maps alone.
ENCODER_ARGUMENTS: tuple[dict[str, Any], ...] = (
    {},
    {"features_only": True},
    {"features_only": True, "pretrained_strict": False},
)


@dataclass(frozen=True)
class TimmFolder:
    """A folder as timm loads it."""

    # The network in evaluation mode.
    network: nn.Module
    # True if the network gives the list of its maps, and nothing else.
    gives_maps: bool

    @property
    def is_channels_last(self) -> bool:
        """True if the maps of the list are (B, h, w, C)."""
        return self.gives_maps and getattr(self.network, "output_fmt", "NCHW") == "NHWC"

    def last_map(self, x: Tensor) -> Tensor:
        """Returns the last map of the list, (B, C, h, w), of normalised images."""
        map_: Tensor = self.network(x)[-1]
        return map_.permute(0, 3, 1, 2) if self.is_channels_last else map_


def describe_for_timm(
    encoder: Encoder,
    model: str,
    options: Mapping[str, Any],
    classes: Sequence[str] = (),
    licence: str | None = None,
) -> dict[str, Any]:
    """Returns the content of `config.json` beside the weights of an encoder, or of a classifier on it.

    Args:
        model: the name of the network in timm.
        options: the sizes that it is built with besides its name.
        classes: the names of the classes in the order of the logits; () for a network without a classifier.
        licence: that of the weights; None if it is not known.
    """
    size = encoder.image_size
    preprocessing = {
        "mean": encoder.input.mean.flatten().tolist(),
        "std": encoder.input.std.flatten().tolist(),
        "input_size": [encoder.image_channels, size, size],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "num_classes": len(classes),
    }
    return {
        "architecture": model,
        "num_classes": len(classes),
        "num_features": encoder.shapes[-1][0],
        # The names stand at the top, where timm and transformers look for them.
        **({"label_names": list(classes)} if classes else {}),
        "model_args": dict(options),
        "pretrained_cfg": {**preprocessing, **({"license": licence} if licence else {})},
    }


def write_timm_config(
    folder: Path, content: Mapping[str, Any], is_right: Callable[[TimmFolder], bool] = lambda _: True
) -> TimmFolder:
    """Writes `config.json` beside `model.safetensors`. Returns the folder as timm loads it by its name.

    Args:
        content: as `describe_for_timm` returns it.
        is_right: returns True if a loaded network is the one that was exported; it may raise what networks raise.

    Raises:
        ValueError: timm cannot load the folder, or gives another network; says why in one line. No file is left.
    """
    import timm

    file, reason = folder / TIMM_CONFIG_FILE, "it is another network there"
    for arguments in ({},) if content["num_classes"] else ENCODER_ARGUMENTS:
        arranged = {**content, "model_args": {**content["model_args"], **arguments}}
        file.write_text(json.dumps(arranged, indent=1), "utf-8")
        try:
            network: nn.Module = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True)
            found = TimmFolder(network.eval(), bool(arguments))
            if is_right(found):
                return found
        # timm fails in the way of each of its networks.
        except Exception as error:
            reason = first_line(error)
    file.unlink()
    raise ValueError(f"timm cannot load the folder by its name: {reason}")
