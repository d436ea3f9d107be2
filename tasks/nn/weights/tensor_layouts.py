"""Names that libraries have for the tensors of an encoder, and a state dict of theirs in these names."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.export_formats import LIBRARIES, TENSOR_PREFIXES, map_tensor_names, network_options
from firstlight.tasks.nn.timm_backbones import TokenMaps
from firstlight.tasks.nn.weights.key_matching import (
    KeyPrefix,
    convert_transformers,
    find_prefix,
    strip_prefix,
)

OWN_LAYOUT = "firstlight"
# The layer names in torchvision's files of densely connected networks; its networks have no dot between the two groups.
DENSE_LAYER_NAME = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


@dataclass(frozen=True)
class TensorLayout:
    """The names that a library has for the tensors of an encoder."""

    library: str
    # The encoder's names -> the library's.
    names: Mapping[str, str]
    # timm's network of the same sizes, whose filter knows older layouts and resamples; None without such a filter.
    network: nn.Module | None = None
    # The names of the library's whole network, heads included.
    known: frozenset[str] = frozenset()


@dataclass(frozen=True)
class FittedTensors:
    """A state dict in the names of a layout."""

    layout: TensorLayout
    prefix: KeyPrefix
    tensors: Mapping[str, Tensor]
    resampled: tuple[str, ...]


def fit_layouts(encoder: Encoder, tensors: Mapping[str, Tensor], name: str) -> FittedTensors:
    """Returns the state dict in the names of the layout that knows most of the encoder's tensors.

    Raises:
        ValueError: none knows one.
    """
    fits = []
    for layout in list_layouts(encoder):
        given = convert_transformers(tensors) if layout.library == "timm" else dict(tensors)
        given = {DENSE_LAYER_NAME.sub(r"\1\2", key): tensor for key, tensor in given.items()}
        prefix = find_prefix(given, layout.names.values())
        fits.append((prefix.count / len(layout.names), layout, prefix, given))
    # timm's filter may know names of which none is one of the network's.
    share, layout, prefix, given = max(fits, key=lambda fit: (fit[0], fit[1].network is not None))
    stripped = strip_prefix(given, prefix.text)
    converted = _convert_older_names(layout, stripped, name)
    if not share and not converted.keys() & set(layout.names.values()):
        held, wanted = (", ".join(map(repr, list(names)[:3])) for names in (tensors, layout.names.values()))
        model = encoder.spec.get("model", encoder.spec["name"])
        raise ValueError(f"{name} has no tensor of {model}: the file has {held}, the network {wanted}")
    changed = [key for key, tensor in converted.items() if key in stripped and stripped[key].shape != tensor.shape]
    return FittedTensors(layout, prefix, converted, tuple(sorted(changed)))


def list_layouts(encoder: Encoder) -> list[TensorLayout]:
    """Returns the layouts that the encoder's tensors have: its own, and those of libraries with the same network."""
    own = {key: key for key in encoder.state_dict()}
    layouts = [TensorLayout(OWN_LAYOUT, own)]
    if encoder.twin is not None:
        return layouts
    if isinstance(encoder.stages, TokenMaps):
        names = {key: key.removeprefix("stages.net.model.") for key in own}
        return [*layouts, TensorLayout("timm", names, encoder.stages.model)]
    # Statistics of batches say nothing about groups.
    if encoder.spec.get("norm", "batch") == "group":
        return layouts
    for library in LIBRARIES:
        if encoder.spec["name"] == library or encoder.spec["name"] in TENSOR_PREFIXES:
            network = _build_timm_network(encoder) if encoder.spec["name"] == library == "timm" else None
            known = frozenset(network.state_dict()) if network is not None else frozenset[str]()
            layouts.append(TensorLayout(library, map_tensor_names(encoder, library)[1], network, known))
    return layouts


def _build_timm_network(encoder: Encoder) -> nn.Module:
    import timm

    options = network_options(encoder)
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(  # type: ignore[no-any-return]
            encoder.spec["model"], pretrained=False, **{**options, "in_chans": encoder.input.channels}
        )


def _convert_older_names(layout: TensorLayout, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Returns what timm's filter of checkpoints makes of a state dict: today's names, embeddings of other sizes.

    Raises:
        ValueError: it fails on these tensors.
    """
    filter_checkpoint: Any = None
    if layout.network is not None:
        filter_checkpoint = getattr(sys.modules[type(layout.network).__module__], "checkpoint_filter_fn", None)
    if filter_checkpoint is None:
        return tensors
    try:
        return dict(filter_checkpoint(dict(tensors), layout.network))
    # It is written for the files of one network, and fails on others in its own way.
    except Exception as error:
        line = str(error).partition("\n")[0][:200] or type(error).__name__
        raise ValueError(f"{name}: timm cannot convert these weights: {line}") from None
