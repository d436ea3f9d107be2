"""Encoders by name: an image in 0..1 -> its feature maps, shallow to deep. Stages pass encoders to later stages."""

import io
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stderr
from dataclasses import fields
from typing import Any, NewType

import torch
from torch import Tensor, nn

from firstlight.tasks.extensions.registry import Registry
from firstlight.tasks.nn.backbones import (
    Body,
    alexnet,
    convnet,
    densenet_builder,
    network1,
    network2,
    resnet_builder,
    sc_convnet,
    vgg16,
)
from firstlight.tasks.nn.feature_maps import MapList, MapPooling, join_channels, pool_maps
from firstlight.tasks.nn.input_normalization import RGB_CHANNELS, InputNormalization, SharedEncoderOptions
from firstlight.tasks.nn.library_backbones import FeatureMaps, first_line, from_torchvision
from firstlight.tasks.nn.timm_backbones import TokenMaps, find_timm_traits, from_timm
from firstlight.tasks.nn.weight_init import initialize_weights
from firstlight.tasks.nn.wide_resnet import wide_resnet

__all__ = [
    "ENCODERS",
    "Encoder",
    "InputNormalization",
    "MapPooling",
    "NetworkSection",
    "SharedEncoderOptions",
    "build_section",
    "pool_maps",
    "pooled_size",
]

_OWN_ENCODERS: dict[str, Callable[..., Body | nn.Module]] = {
    "convnet": convnet,
    "alexnet": alexnet,
    "resnet18": resnet_builder("resnet18"),
    "resnet50": resnet_builder("resnet50"),
    "resnet101": resnet_builder("resnet101"),
    "vgg16": vgg16,
    "densenet121": densenet_builder("densenet121"),
    "densenet169": densenet_builder("densenet169"),
    "densenet201": densenet_builder("densenet201"),
    "network1": network1,
    "network2": network2,
    "sc_convnet": sc_convnet,
    "wide_resnet": wide_resnet,
    "torchvision": from_torchvision,
    "timm": from_timm,
}
ENCODERS = Registry("encoders", _OWN_ENCODERS)
# The keys of an encoder's section in a recipe: those of its spec, and of the origin of its weights.
NetworkSection = NewType("NetworkSection", dict[str, Any])
# The keys of the origin of its weights.
WEIGHT_SECTION_KEYS = ("weights", "part", "licence")
_SHARED = tuple(field.name for field in fields(SharedEncoderOptions))


class Tower(nn.Module):
    """An input and the network on it.

    Args:
        body: stages, each of which gives a map, or a module that gives the list of all maps.
    """

    def __init__(self, input: InputNormalization, body: Body | nn.Module) -> None:
        super().__init__()
        self.input = input
        self.stages = nn.ModuleList(body) if isinstance(body, list) else body

    def forward(self, x: Tensor, depth: int | None = None, region: Tensor | None = None) -> MapList:
        """Returns the feature maps, shallow to deep; only the first `depth` of them if it is given.

        `region`: the part of each view that shows the image, as `InputNormalization.forward` takes it.
        """
        return self.run_stages(self.input(x, region), depth)

    def run_stages(self, x: Tensor, depth: int | None = None) -> MapList:
        """Returns the feature maps of what `input` has made of the images."""
        if isinstance(self.stages, TokenMaps):
            return self.stages(x, depth)  # type: ignore[no-any-return]
        if not isinstance(self.stages, nn.ModuleList):
            return MapList(self.stages(x)[:depth])
        maps = []
        for stage in self.stages[:depth]:
            x = stage(x)
            maps.append(x)
        return MapList(maps)

    def compose_filters(self) -> Tensor | None:
        """Returns the (n, c, k, k) filters of the first convolution as they act on the image.

        Returns None if no convolution takes the whole input.
        """
        first = next((module for module in self.stages.modules() if isinstance(module, nn.Conv2d)), None)
        if first is None or first.weight.shape[1] != self.input.channels:
            return None
        return self.input.compose_filters(first.weight.detach())


class Encoder(Tower):
    """The network of a spec: `name`, the parameters of that entry of ENCODERS, and those of `SharedEncoderOptions`.

    The attribute `shapes` holds (C, h, w) of each feature map for images of `image_size`. `input: rgb_sobel` has a
    second tower, `twin`, and the maps of both are concatenated along their channels. Parameters that the deepest map
    does not depend on are frozen: a library's network may have some, and DistributedDataParallel waits for a gradient
    of every trained parameter.

    Raises:
        ValueError: images of `image_size` are too small for the network, or the entry of ENCODERS raises it.
    """

    def __init__(self, spec: Mapping[str, Any], image_size: int) -> None:
        shared = SharedEncoderOptions(**{key: spec[key] for key in _SHARED if key in spec})
        own = {key: value for key, value in spec.items() if key not in (*_SHARED, "name")}
        first, *others = [(input, ENCODERS[spec["name"]](input.channels, **own)) for input in shared.build_inputs()]
        super().__init__(*first)
        self.twin = Tower(*others[0]) if others else None
        # Encoders of three channels were saved without their number.
        known = {key: value for key, value in spec.items() if key != "channels" or value not in (None, RGB_CHANNELS)}
        self.spec, self.image_size = known, image_size
        initialize_weights(self, shared.init)
        self._measure_maps()

    def forward(self, x: Tensor, depth: int | None = None, region: Tensor | None = None) -> MapList:
        maps = super().forward(x, depth, region)
        return maps if self.twin is None else join_channels(maps, self.twin(x, depth, region))

    @property
    def has_class_token(self) -> bool:
        """True if the network gives a class token beside each map, which can be pooled (`pool: cls`)."""
        return isinstance(self.stages, TokenMaps) and self.stages.has_class_token

    @property
    def image_channels(self) -> int:
        """The number of channels of the images that it takes."""
        return self.input.image_channels

    @property
    def input_channels(self) -> int:
        """The number of channels that `normalize_images` gives."""
        return self.input.channels + (self.twin.input.channels if self.twin is not None else 0)

    def normalize_images(self, x: Tensor, region: Tensor | None = None) -> Tensor:
        """Returns what the inputs of all towers make of (B, C, H, W) images: (B, channels, H, W)."""
        inputs = [self.input] if self.twin is None else [self.input, self.twin.input]
        return torch.cat([input(x, region) for input in inputs], 1)

    def forward_normalized(self, x: Tensor) -> MapList:
        """Returns the feature maps of what `normalize_images` returns."""
        if self.twin is None:
            return self.run_stages(x)
        first, second = x.split([self.input.channels, self.twin.input.channels], 1)
        return join_channels(self.run_stages(first), self.twin.run_stages(second))

    def compose_first_filters(self) -> list[Tensor]:
        """Returns `compose_filters` of each tower that has such filters."""
        towers = (self, self.twin) if self.twin is not None else (self,)
        return [filters for tower in towers if (filters := tower.compose_filters()) is not None]

    def parameter_blocks(self) -> list[set[nn.Parameter]]:
        """Returns the trained parameters by the first feature map that is computed from them, shallow to deep.

        The final normalisation of a network of one resolution follows every map, and belongs to the deepest.
        """
        towers = [self] if self.twin is None else [self, self.twin]
        norms = [tower.stages.final_norm for tower in towers if isinstance(tower.stages, TokenMaps)]
        last = {parameter for norm in norms if norm is not None for parameter in norm.parameters()}
        known, found = set[Tensor](last), []
        for map_ in self._compute_maps():
            new = _find_parameters(map_) - known
            found.append({parameter for parameter in self.parameters() if parameter in new})
            known |= found[-1]
        found[-1] |= {parameter for parameter in last if parameter.requires_grad}
        return found

    def drop_last_pool(self) -> None:
        """Leaves out the max-pooling in the last stage, so that the deepest map is the one before it.

        Raises:
            ValueError: the last stage has none, or several.
        """
        for tower in [self] if self.twin is None else [self, self.twin]:
            stage = tower.stages[-1] if isinstance(tower.stages, nn.ModuleList) else nn.Identity()
            pools = [name for name, module in stage.named_modules() if isinstance(module, nn.MaxPool2d)]
            if len(pools) != 1:
                name = self.spec["name"]
                raise ValueError(
                    f"last_pool: 'drop' is not valid: {name} does not end with one max-pooling; valid: keep"
                )
            stage.set_submodule(pools[0], nn.Identity())
        self.shapes = [tuple(map_.shape[1:]) for map_ in self._compute_maps()]

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """Loads weights as torch does; those of an earlier version may turn a ViT into what it was (`TokenMaps`)."""
        loaded = super().load_state_dict(*args, **options)
        if isinstance(self.stages, TokenMaps) and len(self.stages.indices) != len(self.shapes):
            self._measure_maps()
        return loaded

    def freeze_unused(self, maps: Iterable[Tensor]) -> None:
        """Freezes the parameters that none of `maps` was computed from; this encoder made them with gradients."""
        used = set[Tensor]().union(*map(_find_parameters, maps))
        for parameter in self.parameters():
            parameter.requires_grad_(parameter in used)

    def _advise_image_size(self, error: Exception) -> str:
        """Returns what helps a network that was built for another size of image; "" if that is not the problem."""
        takes_size = self.spec["name"] == "timm" and "img_size" in find_timm_traits(self.spec["model"]).parameters
        if not takes_size or "match model" not in str(error):
            return ""
        return f"; advised: img_size: {self.image_size}"

    def _measure_maps(self) -> None:
        maps = self._compute_maps()
        self.shapes = [tuple(map_.shape[1:]) for map_ in maps]
        self.freeze_unused(maps[-1:])

    def _compute_maps(self) -> MapList:
        """Computes the maps of one black image, without a change of the network."""
        name, size = self.spec.get("model", self.spec["name"]), self.image_size
        try:
            # A traced network prints its source when it fails.
            with torch.enable_grad(), redirect_stderr(io.StringIO()):
                maps: MapList = self.eval()(torch.zeros(1, self.image_channels, size, size))
        except (RuntimeError, AssertionError, ValueError) as error:
            if isinstance(self.stages, FeatureMaps):
                advice = self._advise_image_size(error)
                raise ValueError(
                    f"model: {name!r} cannot take images of {size} pixels: {first_line(error)}{advice}"
                ) from None
            raise ValueError(f"images of {size} pixels are too small for {name}") from None
        if any(map_.ndim != 4 for map_ in maps):
            raise ValueError(f"model: {name!r} gives no feature maps, but {[tuple(map_.shape) for map_ in maps]}")
        if any(map_.numel() == 0 for map_ in maps):
            raise ValueError(f"images of {size} pixels are too small for {name}")
        self.train()
        return maps


def build_section(section: NetworkSection, image_size: int, name: str) -> Encoder:
    """Builds the network of a section, with fresh weights.

    Raises:
        ValueError: its settings are not valid; the message starts with `name` and a dot.
    """
    try:
        return Encoder({key: value for key, value in section.items() if key not in WEIGHT_SECTION_KEYS}, image_size)
    except ValueError as error:
        is_of_key = str(error).partition(":")[0] in section
        raise ValueError(f"{name}.{error}" if is_of_key else f"{name}: {error}") from None


def _find_parameters(result: Tensor) -> set[Tensor]:
    """Returns the parameters that `result` was computed from."""
    found, seen, left = set(), set(), [result.grad_fn]
    while left:
        step = left.pop()
        if step is None or step in seen:
            continue
        seen.add(step)
        if hasattr(step, "variable"):
            found.add(step.variable)
        left += [before for before, _ in step.next_functions]
    return found


def pooled_size(encoder: Encoder, pool: str, layer: int = -1) -> int:
    """Returns the number of features that `pool_maps` gives of a map; by default of the deepest.

    Raises:
        ValueError: the encoder has no class token, and `pool` needs one.
    """
    if pool in ("cls", "cls_avg") and not encoder.has_class_token:
        name = encoder.spec.get("model", encoder.spec["name"])
        raise ValueError(f"pool: {pool!r} needs a class token, and {name} has none; valid: avg, flatten")
    c, h, w = encoder.shapes[layer]
    return int({"avg": c, "cls": c, "cls_avg": 2 * c, "flatten": c * h * w}[pool])
