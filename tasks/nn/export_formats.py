"""An encoder in the forms in which others take it: the state dict of a library's network, and a graph from images to features.

A library's network is a counterpart of an encoder if the encoder's tensors fill all of it but its head, and if it then gives the same map.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from firstlight.tasks.nn.encoders import Encoder, pooled

LIBRARIES = ("torchvision", "timm")
FORMATS = (*LIBRARIES, "safetensors", "onnx", "torch_export")
TOLERANCE = 1e-4  # of the largest absolute value: what single precision may differ by, summed up in another order
VGG16_ENDS = (
    0,
    7,
    14,
    24,
    34,
    44,
)  # places of the stages of firstlight.tasks.nn.backbones.vgg16 among the layers of torchvision's and timm's
PREFIXES: dict[
    str, tuple[str, dict[str, str]]
] = {  # name of an encoder -> its name in both libraries, and how its tensors are called there
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
            for k, (start, end) in enumerate(itertools.pairwise(VGG16_ENDS))
            for i in range(end - start)
        },
    ),
}


@dataclass(frozen=True)
class Counterpart:
    """A library's network that an encoder's weights fit."""

    library: str  # torchvision | timm
    model: str  # its name there
    names: dict[str, str]  # of the encoder's tensors -> of its own
    place: str  # of its last map: the node of torchvision's graph, or the method of timm's network
    turned: bool  # its last map is (B, h, w, C)

    def state(self, encoder: Encoder) -> dict[str, Tensor]:
        """The encoder's tensors under the library's names."""
        own = encoder.state_dict()
        return {there: own[here].detach().cpu().contiguous().clone() for here, there in self.names.items()}

    def network(self, state: Mapping[str, Tensor]) -> tuple[nn.Module, list[str]]:
        """The library's network with these weights, for evaluation, and the names of its tensors that are not among them: its head.

        Raises:
            ValueError: a tensor has no place in it.
        """
        net = _library_network(self.library, self.model)
        try:
            missing, unexpected = net.load_state_dict(dict(state), strict=False)
        except RuntimeError as error:
            raise ValueError(
                f"the weights do not fit {self.model} of {self.library}: {str(error).splitlines()[-1].strip()}"
            ) from None
        if unexpected:
            raise ValueError(f"{self.model} of {self.library} has no {unexpected[0]}")
        return net.eval(), list(missing)

    def last_map(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """(B, 3, H, W) normalised images -> (B, C, h, w), the last map, by the library's own forward."""
        if self.library == "torchvision":
            from torchvision.models.feature_extraction import create_feature_extractor

            trunk = create_feature_extractor(network, {self.place: "map"}, suppress_diff_warning=True)
            return lambda x: trunk(x)["map"].permute(0, 3, 1, 2) if self.turned else trunk(x)["map"]
        if self.place == "forward_features":
            return lambda x: network.forward_features(x)  # type: ignore[operator,no-any-return]
        return lambda x: network.forward_intermediates(x, output_fmt="NCHW", intermediates_only=True)[-1]  # type: ignore[operator,no-any-return]


def counterpart(encoder: Encoder, library: str) -> Counterpart:
    """The network of `library` that this encoder is.

    Raises:
        ValueError: there is none; says why.
    """
    spec = encoder.spec
    if spec.get("input", "rgb") != "rgb":
        raise ValueError(f"{library}'s networks take RGB images, this one has encoder.input: {spec['input']}")
    if spec.get("norm", "batch") == "group":
        raise ValueError(f"{library}'s networks have batch normalisation, this one has encoder.norm: group")
    if spec.get("stem", "imagenet") != "imagenet":
        raise ValueError(f"{library}'s networks begin with stride 4, this one has encoder.stem: {spec['stem']}")
    model, names = _names(encoder, library)
    for place, turned in _places(model, library):
        found = Counterpart(library, model, names, place, turned)
        if _fits(encoder, found):
            return found
    raise ValueError(f"{model} of {library}, with the same weights, gives no map that is this encoder's last")


def lacks(encoder: Encoder, format: str) -> str | None:
    """Why an encoder cannot be had in a format; None: it can."""
    try:
        if format in LIBRARIES:
            counterpart(encoder, format)
    except ValueError as error:
        return str(error)
    return None


def _names(encoder: Encoder, library: str) -> tuple[str, dict[str, str]]:
    """The name of the counterpart, and that of each tensor there."""
    name, keys, own = encoder.spec["name"], _batch_norm_names(encoder), list(encoder.state_dict())
    if name == library:
        model = encoder.spec["model"]
        there = _zoo_names(keys, model, library)
    elif name in PREFIXES:
        model, prefixes = PREFIXES[name]
        there = [_renamed(key.removeprefix("stages."), prefixes) for key in keys]
    else:
        other = f", it is {encoder.spec['model']!r} of {name}" if name in LIBRARIES else ""
        raise ValueError(f"{library} has no network like encoder.name: {name}{other}")
    return model, dict(zip(own, there, strict=True))


def _batch_norm_names(encoder: Encoder) -> list[str]:
    """The encoder's tensors as they are called with plain batch normalisation: `sync` may have one more level, in the same order."""
    if encoder.spec.get("norm", "batch") == "batch":
        return list(encoder.state_dict())
    with torch.random.fork_rng(devices=[]):
        return list(Encoder({**encoder.spec, "norm": "batch"}, encoder.image_size).state_dict())


def _renamed(key: str, prefixes: Mapping[str, str]) -> str:
    old = max((prefix for prefix in prefixes if key.startswith(prefix)), key=len)
    return prefixes[old] + key.removeprefix(old)


def _zoo_names(keys: list[str], model: str, library: str) -> list[str]:
    """timm's feature extractors call `stages.0` of a network `stages_0`, or put it all into `model`; torchvision's change no name."""
    keys = [key.removeprefix("stages.net.") for key in keys]
    if library == "torchvision":
        return keys
    known = _library_network(library, model).state_dict().keys()
    named = []
    for key in keys:
        first, _, rest = key.partition(".")
        forms = (key, rest, f"{first.replace('_', '.', 1)}.{rest}", f"{'.'.join(first.rsplit('_', 1))}.{rest}")
        fits = next((form for form in forms if form in known), None)
        if fits is None:
            raise ValueError(f"{model} of timm has no {key}")
        named.append(fits)
    return named


def _library_network(library: str, model: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        if library == "torchvision":
            from firstlight.tasks.nn.library_backbones import fresh

            return fresh(model)
        import timm

        return timm.create_model(model, pretrained=False)  # type: ignore[no-any-return]


def _places(model: str, library: str) -> list[tuple[str, bool]]:
    """Where the last map may be, and whether its channels come last."""
    if library == "torchvision":
        from firstlight.tasks.nn.library_backbones import maps_of

        return list(maps_of(model).items())[-1:]
    return [("forward_features", False), ("forward_intermediates", False)]


@torch.no_grad()
def _fits(encoder: Encoder, found: Counterpart) -> bool:
    """Whether one image has the same last map in both."""
    size, training = encoder.image_size, encoder.training
    x = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    encoder.eval()
    try:
        device = next(encoder.parameters()).device
        own = encoder(x.to(device))[-1].cpu()
        there = found.last_map(found.network(found.state(encoder))[0])(encoder.input(x.to(device)).cpu())
    except (
        RuntimeError,
        AttributeError,
        TypeError,
        AssertionError,
    ):  # a network without this method, or with another shape of map
        return False
    finally:
        encoder.train(training)
    return there.shape == own.shape and difference(own, there)[1] <= TOLERANCE


def difference(own: Tensor, other: Tensor) -> tuple[float, float]:
    """The largest absolute difference of two tensors, and its ratio to the largest absolute value of the first; inf where one is not finite."""
    if not (own.isfinite().all() and other.isfinite().all()):
        return float("inf"), float("inf")
    largest = float((own.double() - other.double()).abs().max())
    return largest, largest / max(float(own.abs().max()), 1e-12)


class Graph(nn.Module):
    """(B, 3, S, S) in 0..1 -> features (B, C), the last map averaged over places, and that map (B, C, h, w). Holds the normalisation."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.encoder(images)
        return pooled(maps, "avg"), maps[-1]


def traced(encoder: Encoder) -> Any:
    """The graph as a torch.export.ExportedProgram, for any number of images."""
    from torch.export import Dim, export

    size = encoder.image_size
    return export(
        Graph(encoder).eval(), (torch.zeros(2, 3, size, size),), dynamic_shapes={"images": {0: Dim("batch", min=1)}}
    )
