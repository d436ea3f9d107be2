"""Networks of torchvision by their names there, always with new weights. Each gives all its feature maps.

torchvision is imported inside functions: it takes seconds, and only its users should wait.
"""

import difflib
import io
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import redirect_stderr
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from firstlight.tasks.nn.backbones import replace_batch_norm
from firstlight.tasks.nn.norms import Norm

if TYPE_CHECKING:
    from torch import fx

# The names in torchvision of the parts after the last feature map.
HEAD_PREFIXES = ("classifier", "fc", "head", "aux", "AuxLogits")
# Networks of torchvision that have no feature maps there, and their twins in timm, which have.
TIMM_TWINS = {
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "vit_l_32": "vit_large_patch32_224",
    "vit_h_14": "vit_huge_patch14_224",
    "inception_v3": "inception_v3",
}
# The sides in pixels of two images that show which dimensions of an activation grow with the image.
PROBE_IMAGE_SIZES = (224, 256)
# The dimensions of a feature map that grow with the image, by the order of its dimensions.
NCHW, NHWC = (False, False, True, True), (False, True, True, False)


class FeatureMaps(nn.Module):
    """A network that gives all its maps at once, as a module that gives the list of its (B, C, h, w) maps.

    Args:
        channels_last: for each map, True if the network gives it as (B, h, w, C).
    """

    def __init__(self, net: nn.Module, channels_last: Sequence[bool]) -> None:
        super().__init__()
        self.net, self.channels_last = net, channels_last

    def forward(self, x: Tensor) -> list[Tensor]:
        found = self.net(x)
        maps = found.values() if isinstance(found, Mapping) else found
        return [map_.permute(0, 3, 1, 2) if turn else map_ for map_, turn in zip(maps, self.channels_last, strict=True)]


def from_torchvision(c_in: int, *, model: str, norm: Norm = "batch") -> nn.Module:
    """Builds a classification network of torchvision, up to its last feature map.

    It gives the last map at each resolution that all later layers depend on.

    `model`: the name of the network in torchvision.

    Raises:
        ValueError: torchvision has no such network, or it has no feature maps. Starts with "model: ".
    """
    import torchvision
    from torchvision.models.feature_extraction import create_feature_extractor

    check_known_model(model, torchvision.models.list_models(module=torchvision.models), "torchvision")
    turned = find_feature_maps(model)
    net = build_untrained(model)
    if c_in != 3:
        _replace_first_convolution(net, c_in)
    trunk = create_feature_extractor(net, list(turned), suppress_diff_warning=True)
    return FeatureMaps(replace_batch_norm(trunk, norm), list(turned.values()))


def first_line(error: Exception) -> str:
    """Returns the message of an error without the source that traced networks add."""
    return str(error).partition("\n")[0] or type(error).__name__


def check_known_model(model: str, known: Collection[str], library: str) -> None:
    """Checks that a library has the network `model`.

    Raises:
        ValueError: it has not; the message names similar ones.
    """
    if model not in known:
        near = difflib.get_close_matches(model, known, n=5)
        advice = (
            f"did you mean {', '.join(map(repr, near))}?"
            if near
            else f"valid: the {len(known)} names of {library}.list_models()"
        )
        raise ValueError(f"model: {model!r} is unknown to {library}; {advice}")


def build_untrained(model: str) -> nn.Module:
    from torchvision.models import get_model

    # Two networks announce another initialisation.
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return get_model(model, weights=None)  # type: ignore[no-any-return]


def _replace_first_convolution(net: nn.Module, c_in: int) -> None:
    """Replaces the first convolution by one of `c_in` channels."""
    name, old = next((name, layer) for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d))
    shape = (old.kernel_size, old.stride, old.padding, old.dilation)
    new = nn.Conv2d(c_in, old.out_channels, *shape, bias=old.bias is not None)  # type: ignore[arg-type]
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    parent, _, last = name.rpartition(".")
    setattr(net.get_submodule(parent), last, new)


def build_without_memory(build: Callable[[], nn.Module]) -> nn.Module:
    """Returns the network that `build` makes, on the device `meta` if it can be made there: it has shapes alone.

    The random numbers that follow are not changed by it.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build()
        # Some networks compute with numbers of tensors as they are built.
        except RuntimeError:
            return build()


@cache
def find_feature_maps(model: str) -> dict[str, bool]:
    """Returns the names of the layers whose outputs are the feature maps, shallow to deep.

    The value of a name is True if the channels of the map come last.

    Raises:
        ValueError: the network has no feature maps.
    """
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    try:
        net = build_without_memory(partial(build_untrained, model)).to("meta")
        training, names = get_graph_node_names(net, suppress_diff_warning=True)
        everything = create_feature_extractor(
            net, [name for name in names if name in training], suppress_diff_warning=True
        ).eval()
        # A traced network prints its source when it fails.
        with redirect_stderr(io.StringIO()):
            small, large = (everything(torch.zeros(1, 3, size, size, device="meta")) for size in PROBE_IMAGE_SIZES)
    # The network cannot be traced, or takes images of one size only.
    except Exception as error:
        twin = f"; valid: name: timm, model: {TIMM_TWINS[model]}" if model in TIMM_TWINS else ""
        raise ValueError(f"model: {model!r} of torchvision gives no feature maps: {first_line(error)}{twin}") from error
    deepest: dict[tuple[int, ...], tuple[str, bool]] = {}
    for name in _find_bottlenecks(everything.graph, small):
        grows = _growing_dimensions(small[name], large[name])
        if grows in (NCHW, NHWC) and not name.startswith(HEAD_PREFIXES):
            size = tuple(length for length, grown in zip(small[name].shape, grows, strict=True) if grown)
            # The order of the names is that of depth.
            deepest.pop(size, None)
            deepest[size] = (name, grows == NHWC)
    if not deepest:
        raise ValueError(f"model: {model!r} of torchvision gives no feature maps")
    return dict(deepest.values())


def _growing_dimensions(small: Any, large: Any) -> tuple[bool, ...]:
    """Returns for each dimension of an activation True if it grows with the image."""
    if not isinstance(small, Tensor) or not isinstance(large, Tensor):
        return ()
    return tuple(a != b for a, b in zip(small.shape, large.shape, strict=True))


def _find_bottlenecks(graph: "fx.Graph", values: Mapping[str, Any]) -> list[str]:
    """Returns the names of graph bottlenecks: activations through which every later one depends on earlier ones.

    They are names in `values`, in the order of computation.
    """
    *nodes, output = graph.nodes
    names = {node: name for name, node in output.args[0].items()}
    position = {node: k for k, node in enumerate(nodes)}
    # `needed` is the last position at which an activation from before is used.
    found, needed = [], 0
    for k, node in enumerate(nodes):
        if needed <= k and node in names and node.op != "placeholder":
            found.append(names[node])
        if not isinstance(values.get(names.get(node, "")), int):
            needed = max([needed, *(position[user] for user in node.users if user is not output)])
    return found
