"""Networks of timm by their names there, always with new weights. Each gives all its feature maps.

A network whose maps are those of its stages gives what timm's `features_only` gives. A network of one resolution (ViT,
DeiT, BEiT, EVA ...) gives the tokens of every block as a map, after the final normalisation, with the class token.

timm is imported inside functions: it takes seconds, and only its users should wait.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from firstlight.tasks.nn.backbones import replace_batch_norm
from firstlight.tasks.nn.feature_maps import MapList
from firstlight.tasks.nn.library_backbones import FeatureMaps, build_without_memory, check_known_model, first_line
from firstlight.tasks.nn.norms import Norm

# The options that go to the constructor of a network.
NETWORK_OPTIONS = ("img_size", "patch_size", "dynamic_img_size")
PixelSide = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class TimmTraits:
    """Facts about a network of timm that its name alone decides."""

    # The names of the parameters of its constructor.
    parameters: frozenset[str]
    # True if all its maps are tokens of one resolution, which `forward_intermediates` gives.
    is_columnar: bool
    # The names of the parameters of `forward_intermediates`; empty if it has no such method.
    intermediates: frozenset[str]


class TokenMaps(FeatureMaps):
    """A network of one resolution: the normalised tokens of each block as a (B, C, h, w) map, and the class tokens.

    A state dict without the final normalisation is that of an encoder saved by an earlier version: the network then
    becomes what it was, three maps of its last blocks without normalisation.
    """

    def __init__(self, model: nn.Module, num_maps: int, intermediates: frozenset[str]) -> None:
        super().__init__(nn.ModuleDict({"model": model}), [False] * num_maps)
        self.indices, self.with_norm = list(range(num_maps)), "norm" in intermediates
        self.intermediates = intermediates
        prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)
        has_token = getattr(model, "has_class_token", getattr(model, "cls_token", None) is not None)
        self.has_class_token = bool(has_token and prefix and "return_prefix_tokens" in intermediates)
        self.register_load_state_dict_pre_hook(_restore_earlier_maps)

    @property
    def model(self) -> nn.Module:
        """The network of timm, without its head."""
        return self.net["model"]  # type: ignore[index,no-any-return]

    @property
    def final_norm(self) -> nn.Module | None:
        """The normalisation that follows the last block, and every map."""
        norm = getattr(self.model, "norm", None)
        return norm if self.with_norm and isinstance(norm, nn.Module) else None

    def forward(self, x: Tensor, depth: int | None = None) -> MapList:
        wanted = {
            "norm": self.with_norm,
            "return_prefix_tokens": self.has_class_token,
            "stop_early": True,
            "output_fmt": "NCHW",
            "intermediates_only": True,
        }
        options = {key: value for key, value in wanted.items() if key in self.intermediates}
        found = self.model.forward_intermediates(x, indices=self.indices[:depth], **options)  # type: ignore[operator]
        if not self.has_class_token:
            return MapList(found)
        # The class token is the first of those before the patches; others are registers and the like.
        return MapList((map_ for map_, _ in found), [tokens[:, 0] for _, tokens in found])

    def embed_visible(self, x: Tensor, visible: Tensor) -> Tensor:
        """Returns the tokens of some patches of (B, c, H, W) images alone: no other patch enters a block.

        They are (B, P + K, C) after the last block and the final normalisation: the P prefix tokens (the class token,
        registers) before those of the K patches that `visible`, (B, K) int64 numbers in row order, names. The network
        is one for which `explain_masking` finds no obstacle.
        """
        model: Any = self.model
        tokens: Tensor = model._pos_embed(model.patch_embed(x))
        prefix, patches = tokens[:, : model.num_prefix_tokens], tokens[:, model.num_prefix_tokens :]
        tokens = model.norm_pre(torch.cat((prefix, patches.take_along_dim(visible[..., None], 1)), 1))
        for block in model.blocks:
            # Activations are kept, or computed again, as in `forward_intermediates`.
            tokens = checkpoint(block, tokens, use_reentrant=False) if model.grad_checkpointing else block(tokens)
        return model.norm(tokens)  # type: ignore[no-any-return]


def explain_masking(stages: nn.Module) -> str | None:
    """Returns why a network cannot leave patches out (`TokenMaps.embed_visible`), as a clause; None if it can."""
    from timm.layers.patch_embed import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(stages, TokenMaps):
        return "has no tokens of one resolution"
    model: Any = stages.model
    plain = VisionTransformer.forward_intermediates
    if not isinstance(model, VisionTransformer) or type(model).forward_intermediates is not plain:
        return "has positions in its attention, or other parts that need all patches"
    if model.pos_embed is None:
        return "adds no position embeddings to its patches"
    if type(model.patch_embed) is not PatchEmbed:
        return "computes its tokens from more than a patch"
    return None


def _restore_earlier_maps(maps: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    assert isinstance(maps, TokenMaps)
    norm = maps.final_norm
    if norm is None or not list(norm.parameters()):
        return
    names = [f"{prefix}net.model.norm.{name}" for name, _ in norm.named_parameters()]
    is_ours = any(name.startswith(f"{prefix}net.model.") for name in state)
    if is_ours and not any(name in state for name in names):
        maps.model.norm = nn.Identity()
        maps.with_norm, maps.has_class_token, maps.indices = False, False, maps.indices[-3:]
        maps.channels_last = [False] * len(maps.indices)


def from_timm(
    c_in: int,
    *,
    model: str,
    norm: Norm = "batch",
    img_size: PixelSide | None = None,
    patch_size: PixelSide | None = None,
    dynamic_img_size: bool | None = None,
    grad_checkpointing: bool | None = None,
) -> nn.Module:
    """Builds a network of timm, with the feature maps that timm gives of it.

    A ViT gives the tokens of every block as a map, after the final normalisation; its class token is a pooling.

    `model`: the name of the network in timm.
    `img_size`: the side in pixels of the images that a ViT or Swin is built for: so many position embeddings it has.
    Images of another side need `dynamic_img_size`. null: timm's own.
    `patch_size`: the side in pixels of the patches of a ViT. null: timm's own.
    `dynamic_img_size`: true takes images of another side than `img_size`; a ViT resamples its position embeddings for
    them. null: true for a ViT, and timm's own for others.
    `grad_checkpointing`: true keeps the activations of block boundaries only and computes the others again for the
    gradient, which is the same: less memory, more time. null: false.

    Raises:
        ValueError: timm has no such network, it has no feature maps, or it does not take an option. Starts with the
            option's name.
    """
    import timm

    check_known_model(model, timm.list_models(), "timm")
    given = {"img_size": img_size, "patch_size": patch_size, "dynamic_img_size": dynamic_img_size}
    with _one_line_errors(model):
        traits = find_timm_traits(model)
    options = _choose_network_options(model, given, traits)
    with _one_line_errors(model, given):
        maps = (
            _build_columnar(model, c_in, options, traits) if traits.is_columnar else _build_staged(model, c_in, options)
        )
    replace_batch_norm(maps.net, norm)
    if grad_checkpointing:
        _turn_on_checkpointing(model, maps)
    return maps


def _build_columnar(model: str, c_in: int, options: Mapping[str, Any], traits: TimmTraits) -> TokenMaps:
    import timm

    net: Any = timm.create_model(model, pretrained=False, num_classes=0, in_chans=c_in, **options)
    indices = net.prune_intermediate_layers(None, prune_norm=False, prune_head=True)
    return TokenMaps(net, len(indices), traits.intermediates)


def _build_staged(model: str, c_in: int, options: Mapping[str, Any]) -> FeatureMaps:
    import timm

    net: Any = timm.create_model(model, pretrained=False, features_only=True, in_chans=c_in, **options)
    channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"
    return FeatureMaps(net, [channels_last] * len(net.feature_info.channels()))


@contextmanager
def _one_line_errors(model: str, given: Mapping[str, Any] | None = None) -> Iterator[None]:
    try:
        yield
    except TypeError as error:
        # The function that builds it has set the option, or hands it on to a class that does not know it.
        names = [name for name in given or () if re.search(f"argument '{name}'", str(error))]
        if given is None or not names:
            raise ValueError(f"model: {model!r} of timm gives no feature maps: {first_line(error)}") from error
        raise _explain_option(model, names[0], given[names[0]]) from None
    # Each of timm's hundreds of networks fails in its own way.
    except Exception as error:
        raise ValueError(f"model: {model!r} of timm gives no feature maps: {first_line(error)}") from error


@cache
def find_timm_traits(model: str) -> TimmTraits:
    """Returns facts about a network of timm. It is built without memory where that works, and once for each name."""
    import timm
    from timm.models._features import FeatureGetterNet

    build = partial(timm.create_model, model, pretrained=False)
    maps: Any = build_without_memory(partial(build, features_only=True))
    kind: Any = type(build_without_memory(build))
    parameters = _list_constructor_parameters(kind)
    is_getter = isinstance(maps, FeatureGetterNet) and hasattr(kind, "prune_intermediate_layers")
    if not is_getter or len(set(maps.feature_info.reduction())) > 1:
        return TimmTraits(parameters, False, frozenset())
    return TimmTraits(parameters, True, frozenset(inspect.signature(kind.forward_intermediates).parameters))


def _list_constructor_parameters(kind: type) -> frozenset[str]:
    """Returns the names of the parameters of a class, and of the classes that its constructor hands others on to."""
    names: set[str] = set()
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        names |= {parameter.name for parameter in parameters}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return frozenset(names)


def _choose_network_options(model: str, given: Mapping[str, Any], traits: TimmTraits) -> dict[str, Any]:
    """Returns the options for the constructor of a network.

    Raises:
        ValueError: one is given that it does not take.
    """
    for name, value in given.items():
        if value is not None and name not in traits.parameters:
            raise _explain_option(model, name, value)
    options = {name: value for name, value in given.items() if value is not None}
    if traits.is_columnar and "dynamic_img_size" in traits.parameters:
        options.setdefault("dynamic_img_size", True)
    return options


def _explain_option(model: str, name: str, value: Any) -> ValueError:
    return ValueError(f"{name}: {value!r} is not valid, since {model!r} of timm takes no {name}; valid: null")


def _turn_on_checkpointing(model: str, maps: FeatureMaps) -> None:
    """Lets a network compute its activations a second time for the gradient.

    Raises:
        ValueError: it cannot, or its batch normalisations would count every batch twice.
    """
    norms = sum(isinstance(module, _BatchNorm) for module in maps.modules())
    if norms:
        raise ValueError(
            f"grad_checkpointing: true is not valid, since the {norms} batch normalisations of {model!r} would count "
            "every batch twice; valid: false, or norm: group"
        )
    net = maps.model if isinstance(maps, TokenMaps) else maps.net
    try:
        net.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, TypeError) as error:
        raise ValueError(f"grad_checkpointing: true is not valid, since {model!r} of timm cannot: {error}") from None
