"""Export formats of an encoder: the state dict of a library's network, and a graph from images to features.

A library's network is the counterpart of an encoder if the encoder's tensors fill all of it but its head, and if it
then gives the same map.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from firstlight.tasks.extensions.error_text import take_last_line
from firstlight.tasks.nn.encoders import Encoder, pool_maps
from firstlight.tasks.nn.input_normalization import RGB_CHANNELS
from firstlight.tasks.nn.timm_backbones import NETWORK_OPTIONS, TokenMaps, find_timm_traits

LIBRARIES = ("torchvision", "timm")
EXPORT_FORMATS = (*LIBRARIES, "safetensors", "onnx", "torch_export")
# The largest difference of two maps, relative to the largest absolute value. Sums in another order differ by less in
# single precision.
MAP_TOLERANCE = 1e-4
# The source of the last map of a ViT: the method `forward_intermediates` of timm with the final normalisation.
NORMED_SOURCE = "forward_intermediates(norm=True)"
# The positions of the stages of firstlight.tasks.nn.backbones.vgg16 among the layers of torchvision's and timm's.
VGG16_STAGE_ENDS = (0, 7, 14, 24, 34, 44)
# The name of an encoder -> its name in both libraries, and the prefixes of its tensors there.
TENSOR_PREFIXES: dict[str, tuple[str, dict[str, str]]] = {
    **{
        name: (name, {"0.0.": "conv1.", "0.1.": "bn1.", **{f"{k}.": f"layer{k}." for k in (1, 2, 3, 4)}})
        for name in ("resnet18", "resnet50", "resnet101")
    },
    **{
        name: (
            name,
            {"0.0.": "features.conv0.", "0.1.": "features.norm0.", "8.0.": "features.norm5."}
            | {f"{2 * k - 1}.": f"features.denseblock{k}." for k in (1, 2, 3, 4)}
            | {f"{2 * k}.": f"features.transition{k}." for k in (1, 2, 3)},
        )
        for name in ("densenet121", "densenet169", "densenet201")
    },
    "vgg16": (
        "vgg16_bn",
        {
            f"{k}.{i}.": f"features.{start + i}."
            for k, (start, end) in enumerate(itertools.pairwise(VGG16_STAGE_ENDS))
            for i in range(end - start)
        },
    ),
}


@dataclass(frozen=True)
class Counterpart:
    """A library's network that an encoder's weights fit."""

    # torchvision | timm
    library: str
    # The name of the network in the library.
    model: str
    # The names of the encoder's tensors -> the names in the library.
    names: dict[str, str]
    # The source of the last map: the node of torchvision's graph, or the method of timm's network.
    source: str
    # True if the last map is (B, h, w, C).
    channels_last: bool
    # The sizes that the library's network is built with, besides its name: timm's `img_size` and the like.
    options: Mapping[str, Any] = field(default_factory=dict)

    def library_state(self, encoder: Encoder) -> dict[str, Tensor]:
        """Returns the encoder's tensors under the library's names."""
        own = encoder.state_dict()
        return {there: own[here].detach().cpu().contiguous().clone() for here, there in self.names.items()}

    def build_network(self, state: Mapping[str, Tensor]) -> tuple[nn.Module, list[str]]:
        """Returns the library's network with these weights, in evaluation mode, and the names of the missing tensors.

        The missing tensors are those of the head.

        Raises:
            ValueError: the network has no tensor of that name or shape.
        """
        net = build_library_network(self.library, self.model, self.options)
        try:
            missing, unexpected = net.load_state_dict(dict(state), strict=False)
        except RuntimeError as error:
            raise ValueError(
                f"the weights do not fit {self.model} of {self.library}: {take_last_line(error)}"
            ) from None
        if unexpected:
            raise ValueError(f"{self.model} of {self.library} has no {unexpected[0]}")
        return net.eval(), list(missing)

    def last_map(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """Returns a function from (B, C, H, W) normalised images to the last map (B, C, h, w).

        It runs the library's own forward.
        """
        if self.library == "torchvision":
            from torchvision.models.feature_extraction import create_feature_extractor

            trunk = create_feature_extractor(network, {self.source: "map"}, suppress_diff_warning=True)
            return lambda x: trunk(x)["map"].permute(0, 3, 1, 2) if self.channels_last else trunk(x)["map"]
        if self.source == "forward_features":
            return lambda x: network.forward_features(x)  # type: ignore[operator,no-any-return]
        normed = {"norm": True} if self.source == NORMED_SOURCE else {}
        options: dict[str, Any] = {"output_fmt": "NCHW", "intermediates_only": True, **normed}
        return lambda x: network.forward_intermediates(x, **options)[-1]  # type: ignore[operator,no-any-return]


def find_counterpart(encoder: Encoder, library: str) -> Counterpart:
    """Returns the network of `library` that is equal to this encoder.

    Raises:
        ValueError: the library has none; the message gives the reason.
    """
    spec = encoder.spec
    if spec.get("input", "rgb") != "rgb":
        raise ValueError(f"{library}'s networks take RGB images, this one has encoder.input: {spec['input']}")
    if spec.get("norm", "batch") == "group":
        raise ValueError(f"{library}'s networks have batch normalisation, this one has encoder.norm: group")
    if spec.get("stem", "imagenet") != "imagenet":
        raise ValueError(f"{library}'s networks begin with stride 4, this one has encoder.stem: {spec['stem']}")
    if library == "torchvision" and encoder.image_channels != RGB_CHANNELS:
        raise ValueError(f"torchvision's networks take images of 3 channels, this one {encoder.image_channels}")
    model, names = map_tensor_names(encoder, library)
    options = network_options(encoder) if library == "timm" else {}
    for source, channels_last in _candidate_sources(model, library):
        found = Counterpart(library, model, names, source, channels_last, options)
        if _has_same_map(encoder, found):
            return found
    raise ValueError(f"{model} of {library}, with the same weights, gives no map that is this encoder's last")


def explain_missing_format(encoder: Encoder, format: str) -> str | None:
    """Returns the reason why an encoder cannot be exported in a format; None if it can."""
    try:
        if format in LIBRARIES:
            find_counterpart(encoder, format)
    except ValueError as error:
        return str(error)
    return None


def network_options(encoder: Encoder) -> dict[str, Any]:
    """Returns the options that timm's constructor takes for the network of an encoder of timm, besides its name.

    A network of one resolution takes images of other sizes only with `dynamic_img_size`.
    """
    channels = {"in_chans": encoder.image_channels} if encoder.image_channels != RGB_CHANNELS else {}
    if encoder.spec["name"] != "timm":
        return channels
    options = {key: encoder.spec[key] for key in NETWORK_OPTIONS if encoder.spec.get(key) is not None}
    is_columnar = isinstance(encoder.stages, TokenMaps)
    if is_columnar and "dynamic_img_size" in find_timm_traits(encoder.spec["model"]).parameters:
        options.setdefault("dynamic_img_size", True)
    return {**options, **channels}


def map_tensor_names(encoder: Encoder, library: str) -> tuple[str, dict[str, str]]:
    """Returns the name of the counterpart, and the names of its tensors."""
    name, keys, own = encoder.spec["name"], _batch_norm_names(encoder), list(encoder.state_dict())
    if name == library:
        model = encoder.spec["model"]
        there = _library_tensor_names(keys, model, library)
    elif name in TENSOR_PREFIXES:
        model, prefixes = TENSOR_PREFIXES[name]
        there = [_rename_tensor(key.removeprefix("stages."), prefixes) for key in keys]
    else:
        other = f", it is {encoder.spec['model']!r} of {name}" if name in LIBRARIES else ""
        raise ValueError(f"{library} has no network like encoder.name: {name}{other}")
    return model, dict(zip(own, there, strict=True))


def _batch_norm_names(encoder: Encoder) -> list[str]:
    """Returns the names of the encoder's tensors with plain batch normalisation.

    `sync` may have one more level; the order is the same.
    """
    if encoder.spec.get("norm", "batch") == "batch":
        return list(encoder.state_dict())
    with torch.random.fork_rng(devices=[]):
        return list(Encoder({**encoder.spec, "norm": "batch"}, encoder.image_size).state_dict())


def _rename_tensor(key: str, prefixes: Mapping[str, str]) -> str:
    old = max((prefix for prefix in prefixes if key.startswith(prefix)), key=len)
    return prefixes[old] + key.removeprefix(old)


def _library_tensor_names(keys: list[str], model: str, library: str) -> list[str]:
    """Returns the names of the tensors in the library's network.

    timm's feature extractors name `stages.0` of a network `stages_0`, or put the whole network into `model`.
    torchvision's change no name.
    """
    keys = [key.removeprefix("stages.net.") for key in keys]
    if library == "torchvision":
        return keys
    known = build_library_network(library, model).state_dict().keys()
    named = []
    for key in keys:
        first, _, rest = key.partition(".")
        forms = (key, rest, f"{first.replace('_', '.', 1)}.{rest}", f"{'.'.join(first.rsplit('_', 1))}.{rest}")
        fits = next((form for form in forms if form in known), None)
        if fits is None:
            raise ValueError(f"{model} of timm has no {key}")
        named.append(fits)
    return named


def build_library_network(library: str, model: str, options: Mapping[str, Any] | None = None) -> nn.Module:
    """Returns a network of torchvision or timm with new weights. The caller's random numbers stay as they are.

    `options`: the sizes that a network of timm is built with, as `network_options` gives them.
    """
    with torch.random.fork_rng(devices=[]):
        if library == "torchvision":
            from firstlight.tasks.nn.library_backbones import build_untrained

            return build_untrained(model)
        import timm

        return timm.create_model(model, pretrained=False, **(options or {}))  # type: ignore[no-any-return]


def _candidate_sources(model: str, library: str) -> list[tuple[str, bool]]:
    """Returns the possible sources of the last map, each with True if its channels come last."""
    if library == "torchvision":
        from firstlight.tasks.nn.library_backbones import find_feature_maps

        return list(find_feature_maps(model).items())[-1:]
    return [("forward_features", False), ("forward_intermediates", False), (NORMED_SOURCE, False)]


@torch.no_grad()
def _has_same_map(encoder: Encoder, found: Counterpart) -> bool:
    """Returns True if encoder and counterpart give the same last map of an image."""
    size, training = encoder.image_size, encoder.training
    x = torch.rand(1, encoder.image_channels, size, size, generator=torch.Generator().manual_seed(0))
    encoder.eval()
    try:
        device = next(encoder.parameters()).device
        own = encoder(x.to(device))[-1].cpu()
        there = found.last_map(found.build_network(found.library_state(encoder))[0])(encoder.input(x.to(device)).cpu())
    # The network lacks this method, or has another shape of map.
    except (RuntimeError, AttributeError, TypeError, AssertionError):
        return False
    finally:
        encoder.train(training)
    return there.shape == own.shape and measure_difference(own, there)[1] <= MAP_TOLERANCE


def measure_difference(own: Tensor, other: Tensor) -> tuple[float, float]:
    """Returns the largest absolute difference of two tensors, and its ratio to the largest absolute value of the first.

    Both are inf if a tensor is not finite.
    """
    if not (own.isfinite().all() and other.isfinite().all()):
        return float("inf"), float("inf")
    largest = float((own.double() - other.double()).abs().max())
    return largest, largest / max(float(own.abs().max()), 1e-12)


class ExportGraph(nn.Module):
    """A graph from (B, C, S, S) images in 0..1 to features (B, C) and the last map (B, C, h, w).

    The features are the map averaged over positions. The graph contains the normalisation.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.encoder(images)
        return pool_maps(maps, "avg"), maps[-1]


def export_program(encoder: Encoder) -> Any:
    """Returns the graph of an encoder as a torch.export.ExportedProgram, for any number of images."""
    return export_graph(ExportGraph(encoder), encoder.image_size, encoder.image_channels)


def export_graph(graph: nn.Module, size: int, channels: int = RGB_CHANNELS) -> Any:
    """Returns a graph that takes (B, `channels`, `size`, `size`) `images`, for any B, as a
    torch.export.ExportedProgram.
    """
    from torch.export import Dim, export

    return export(
        graph.eval(),
        (torch.zeros(2, channels, size, size),),
        dynamic_shapes={"images": {0: Dim("batch", min=1)}},
    )
