"""Networks of torchvision and timm by their names there, always with fresh weights. Each gives all its feature maps at once.

Both libraries are imported where they are used: they take seconds, which only those who use them wait for.
"""

import difflib
import io
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stderr
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from firstlight.tasks.nn.backbones import with_norm
from firstlight.tasks.nn.norms import Norm

if TYPE_CHECKING:
    from torch import fx

HEADS = ("classifier", "fc", "head", "aux", "AuxLogits")  # what torchvision calls the parts behind the last feature map
SIZES = (224, 256)  # pixels of the two images that tell which dimensions of an activation grow with the image
NCHW, NHWC = (False, False, True, True), (False, True, True, False)


class Maps(nn.Module):
    """A network whose maps come all at once -> their list. `turned`: whether a map is (B, h, w, C) and becomes (B, C, h, w)."""

    def __init__(self, net: nn.Module, turned: Sequence[bool]) -> None:
        super().__init__()
        self.net, self.turned = net, turned

    def forward(self, x: Tensor) -> list[Tensor]:
        found = self.net(x)
        maps = found.values() if isinstance(found, Mapping) else found
        return [map_.permute(0, 3, 1, 2) if turn else map_ for map_, turn in zip(maps, self.turned, strict=True)]


def from_torchvision(c_in: int, *, model: str, norm: Norm = "batch") -> nn.Module:
    """torchvision's classification network `model`, up to its last feature map: the last map at each resolution that all later layers see.

    Raises:
        ValueError: torchvision has no such network, or it has no feature maps. Starts with "model: ".
    """
    import torchvision
    from torchvision.models.feature_extraction import create_feature_extractor

    _check_known(model, torchvision.models.list_models(module=torchvision.models), "torchvision")
    turned = maps_of(model)
    net = fresh(model)
    if c_in != 3:
        _widen(net, c_in)
    trunk = create_feature_extractor(net, list(turned), suppress_diff_warning=True)
    return Maps(with_norm(trunk, norm), list(turned.values()))


def from_timm(c_in: int, *, model: str, norm: Norm = "batch") -> nn.Module:
    """timm's network `model`, with the feature maps that timm gives of it (`features_only`).

    Raises:
        ValueError: timm has no such network, or it has no feature maps. Starts with "model: ".
    """
    import timm

    _check_known(model, timm.list_models(), "timm")
    try:
        net: Any = timm.create_model(model, pretrained=False, features_only=True, in_chans=c_in)
    except Exception as error:  # each of timm's hundreds of networks fails in its own way
        raise ValueError(f"model: {model!r} of timm gives no feature maps: {first_line(error)}") from error
    channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"
    return Maps(with_norm(net, norm), [channels_last] * len(net.feature_info.channels()))


def first_line(error: Exception) -> str:
    """What an error says, without the source that traced networks add."""
    return str(error).partition("\n")[0] or type(error).__name__


def _check_known(model: str, known: Collection[str], library: str) -> None:
    if model not in known:
        near = difflib.get_close_matches(model, known, n=5)
        advice = (
            f"did you mean {', '.join(map(repr, near))}?"
            if near
            else f"valid: the {len(known)} names of {library}.list_models()"
        )
        raise ValueError(f"model: {model!r} is unknown to {library}; {advice}")


def fresh(model: str) -> nn.Module:
    from torchvision.models import get_model

    with warnings.catch_warnings(
        action="ignore", category=FutureWarning
    ):  # two networks announce another initialisation
        return get_model(model, weights=None)  # type: ignore[no-any-return]


def _widen(net: nn.Module, c_in: int) -> None:
    """Replace the first convolution by one of `c_in` channels."""
    name, old = next((name, layer) for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d))
    shape = (old.kernel_size, old.stride, old.padding, old.dilation)
    new = nn.Conv2d(c_in, old.out_channels, *shape, bias=old.bias is not None)  # type: ignore[arg-type]
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    parent, _, last = name.rpartition(".")
    setattr(net.get_submodule(parent), last, new)


@cache
def maps_of(model: str) -> dict[str, bool]:
    """The names of the layers whose outputs are the feature maps, shallow to deep, and whether a map's channels come last.

    Raises:
        ValueError: there are none.
    """
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    try:
        with torch.random.fork_rng(devices=[]):
            net = fresh(model).to("meta")  # shapes only, without arithmetic
        training, names = get_graph_node_names(net, suppress_diff_warning=True)
        everything = create_feature_extractor(
            net, [name for name in names if name in training], suppress_diff_warning=True
        ).eval()
        with redirect_stderr(io.StringIO()):  # a traced network prints its source when it fails
            small, large = (everything(torch.zeros(1, 3, size, size, device="meta")) for size in SIZES)
    except Exception as error:  # what cannot be traced, or takes images of one size only
        raise ValueError(f"model: {model!r} of torchvision gives no feature maps: {first_line(error)}") from error
    deepest: dict[tuple[int, ...], tuple[str, bool]] = {}
    for name in _bottlenecks(everything.graph, small):
        grows = _grows(small[name], large[name])
        if grows in (NCHW, NHWC) and not name.startswith(HEADS):
            size = tuple(length for length, place in zip(small[name].shape, grows, strict=True) if place)
            deepest.pop(size, None)  # so that the order is that of depth
            deepest[size] = (name, grows == NHWC)
    if not deepest:
        raise ValueError(f"model: {model!r} of torchvision gives no feature maps")
    return dict(deepest.values())


def _grows(small: Any, large: Any) -> tuple[bool, ...]:
    """Which dimensions of an activation grow with the image."""
    if not isinstance(small, Tensor) or not isinstance(large, Tensor):
        return ()
    return tuple(a != b for a, b in zip(small.shape, large.shape, strict=True))


def _bottlenecks(graph: "fx.Graph", values: Mapping[str, Any]) -> list[str]:
    """The names in `values` of the activations that all later ones are computed from alone, in the order of computation."""
    *nodes, output = graph.nodes
    names = {node: name for name, node in output.args[0].items()}
    place = {node: k for k, node in enumerate(nodes)}
    found, needed = [], 0  # needed: the last place where an activation from before is used
    for k, node in enumerate(nodes):
        if needed <= k and node in names and node.op != "placeholder":
            found.append(names[node])
        if not isinstance(values.get(names.get(node, "")), int):
            needed = max([needed, *(place[user] for user in node.users if user is not output)])
    return found
