"""Folders that `timm.create_model("local-dir:<folder>", pretrained=True)` loads, and that a hub can serve."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from firstlight.tasks.nn.encoders import Encoder

TIMM_CONFIG_FILE = "config.json"


def describe_for_timm(
    encoder: Encoder, model: str, options: Mapping[str, Any], classes: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns the content of `config.json` beside the weights of an encoder, or of a classifier on it.

    Args:
        model: the name of the network in timm.
        options: the sizes that it is built with besides its name.
        classes: the names of the classes in the order of the logits; () for a network without a classifier.
    """
    size = encoder.image_size
    preprocessing = {
        "mean": encoder.input.mean.flatten().tolist(),
        "std": encoder.input.std.flatten().tolist(),
        "input_size": [3, size, size],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "num_classes": len(classes),
    }
    labels = {"label_names": list(classes)} if classes else {}
    return {
        "architecture": model,
        "num_classes": len(classes),
        "num_features": encoder.shapes[-1][0],
        "model_args": dict(options),
        "pretrained_cfg": {**preprocessing, **labels},
    }


def write_timm_config(folder: Path, content: Mapping[str, Any]) -> nn.Module | None:
    """Writes `config.json` beside `model.safetensors`, and returns the network as timm loads the folder.

    Returns None, and leaves no file, if timm cannot: its network has layers after the last map that have no weights
    here, or it does not normalise images by a mean and a standard deviation.
    """
    import timm

    file = folder / TIMM_CONFIG_FILE
    file.write_text(json.dumps(content, indent=1), "utf-8")
    try:
        network: nn.Module = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True)
    # timm fails in the way of each of its networks.
    except Exception:
        file.unlink()
        return None
    return network.eval()
