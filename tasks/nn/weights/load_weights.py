"""Loads weights of any known layout into an encoder, or says in one line why they do not fit."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.export_formats import LIBRARIES, TENSOR_PREFIXES, _map_tensor_names
from firstlight.tasks.nn.timm_backbones import TokenMaps
from firstlight.tasks.nn.weights.checkpoint_files import StateDictFile, read_state_dict
from firstlight.tasks.nn.weights.key_matching import (
    KeyPrefix,
    convert_transformers,
    drop_compiler_names,
    find_prefix,
    strip_prefix,
)
from firstlight.tasks.nn.weights.weight_sources import WeightSource

OWN_LAYOUT = "firstlight"
# Tensors that follow from the network's sizes, or count batches: they may be missing or left over.
DERIVED_NAMES = ("num_batches_tracked", "relative_position_index", "attn_mask", "relative_coords_table")
# How torchvision's files of densely connected networks name layers, and how its networks do.
DENSE_LAYER_NAME = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


@dataclass(frozen=True)
class LoadedWeights:
    """What was loaded into an encoder, and from where. Names of tensors are those of the file, without their prefix."""

    source: WeightSource
    sha256: str
    # The part of the file and the prefix of its names that were taken, and others that might have been.
    part: str
    prefix: str
    others: tuple[str, ...]
    # firstlight | timm | torchvision: whose names the tensors have.
    layout: str
    loaded: tuple[str, ...]
    # Names in the file that the encoder has no place for: heads, and other networks.
    left_out: tuple[str, ...]
    # Names of the encoder that the file lacks; they keep their values: counts of batches only.
    kept: tuple[str, ...]
    # Position embeddings and patch embeddings that were resampled, and input layers adapted to other channels.
    resampled: tuple[str, ...]
    adapted: tuple[str, ...]

    def describe(self) -> str:
        """Returns one line for people: how many tensors, from which part, and what was changed or left out."""
        words = [f"{len(self.loaded)} tensors from {self.source.source}"]
        words += [f"part {self.part!r}"] if self.part else []
        words += [f"names behind {self.prefix!r}"] if self.prefix else []
        words += [f"not taken: {', '.join(map(repr, self.others[:3]))}"] if self.others else []
        for verb, names in (("resampled", self.resampled), ("adapted to the input", self.adapted)):
            words += [f"{verb}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"] if names else []
        tops = list(dict.fromkeys(name.split(".")[0] for name in self.left_out))
        words += [f"left out: {len(self.left_out)} ({', '.join(tops[:4])})"] if tops else []
        return "; ".join(words)


@dataclass(frozen=True)
class _Layout:
    """The names that a library has for the tensors of an encoder."""

    library: str
    # The encoder's names -> the library's.
    names: Mapping[str, str]
    # timm's network of the same sizes, whose filter knows older layouts and resamples; None without such a filter.
    network: nn.Module | None = None
    # The names of the library's whole network, heads included.
    known: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Fit:
    """A state dict in the names of a layout."""

    layout: _Layout
    prefix: KeyPrefix
    tensors: Mapping[str, Tensor]
    resampled: tuple[str, ...]


@torch.no_grad()
def load_weights(encoder: Encoder, source: WeightSource, part: str | None = None) -> LoadedWeights:
    """Loads the weights of a file into an encoder. The encoder is left as it was if they do not fit.

    Args:
        encoder: gets the weights; its mode and what is frozen stay.
        source: as `find_weights` returns it.
        part: the part of the file, as for `read_state_dict`.

    Raises:
        ValueError: the file is refused, or the weights do not fit the encoder; in one line.
    """
    file = read_state_dict(source.path, part)
    name = repr(source.source)
    fit = _fit_layouts(encoder, drop_compiler_names(file.tensors), name)
    fresh, adapted = _place_tensors(encoder, fit, name)
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    encoder.load_state_dict({**before, **fresh})
    if not _gives_finite_maps(encoder):
        encoder.load_state_dict(before)
        raise ValueError(f"{name}: the feature maps of an image of noise are not finite with these weights")
    return _describe_loaded(source, file, fit, fresh, adapted)


def _describe_loaded(
    source: WeightSource, file: StateDictFile, fit: _Fit, fresh: Mapping[str, Tensor], adapted: tuple[str, ...]
) -> LoadedWeights:
    used = {fit.layout.names[own] for own in fresh}
    behind = {fit.prefix.text + name for name in used}
    return LoadedWeights(
        source=source,
        sha256=file.sha256,
        part=file.part,
        prefix=fit.prefix.text,
        others=(*file.other_parts, *fit.prefix.others),
        layout=fit.layout.library,
        loaded=tuple(sorted(used)),
        left_out=tuple(sorted({*(fit.tensors.keys() - used), *_names_elsewhere(file, fit, behind)})),
        kept=tuple(sorted(fit.layout.names.keys() - fresh.keys())),
        resampled=fit.resampled,
        adapted=adapted,
    )


def _names_elsewhere(file: StateDictFile, fit: _Fit, behind: set[str]) -> set[str]:
    """Returns the names in the file that do not have the prefix of the network."""
    return {name for name in drop_compiler_names(file.tensors) if not name.startswith(fit.prefix.text)} - behind


def _fit_layouts(encoder: Encoder, tensors: Mapping[str, Tensor], name: str) -> _Fit:
    """Returns the state dict in the names of the layout that knows most of the encoder's tensors.

    Raises:
        ValueError: none knows one.
    """
    fits = []
    for layout in _list_layouts(encoder):
        given = convert_transformers(tensors) if layout.library == "timm" else dict(tensors)
        given = {DENSE_LAYER_NAME.sub(r"\1\2", key): tensor for key, tensor in given.items()}
        prefix = find_prefix(given, layout.names.values())
        fits.append((prefix.count / len(layout.names), layout, prefix, given))
    share, layout, prefix, given = max(fits, key=lambda fit: fit[0])
    stripped = strip_prefix(given, prefix.text)
    converted = _convert_older_names(layout, stripped, name)
    if not share and not converted.keys() & set(layout.names.values()):
        held, wanted = (", ".join(map(repr, list(names)[:3])) for names in (tensors, layout.names.values()))
        model = encoder.spec.get("model", encoder.spec["name"])
        raise ValueError(f"{name} has no tensor of {model}: the file has {held}, the network {wanted}")
    changed = [key for key, tensor in converted.items() if key in stripped and stripped[key].shape != tensor.shape]
    return _Fit(layout, prefix, converted, tuple(sorted(changed)))


def _list_layouts(encoder: Encoder) -> list[_Layout]:
    """Returns the layouts that the encoder's tensors have: its own, and those of libraries with the same network."""
    own = {key: key for key in encoder.state_dict()}
    layouts = [_Layout(OWN_LAYOUT, own)]
    if encoder.twin is not None or encoder.spec.get("norm", "batch") == "group":
        return layouts
    if isinstance(encoder.stages, TokenMaps):
        names = {key: key.removeprefix("stages.net.model.") for key in own}
        return [*layouts, _Layout("timm", names, encoder.stages.model)]
    for library in LIBRARIES:
        if encoder.spec["name"] == library or encoder.spec["name"] in TENSOR_PREFIXES:
            network = _build_timm_network(encoder) if encoder.spec["name"] == library == "timm" else None
            known = frozenset(network.state_dict()) if network is not None else frozenset[str]()
            layouts.append(_Layout(library, _map_tensor_names(encoder, library)[1], network, known))
    return layouts


def _build_timm_network(encoder: Encoder) -> nn.Module:
    import timm

    options = {key: value for key in ("img_size", "patch_size") if (value := encoder.spec.get(key)) is not None}
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(  # type: ignore[no-any-return]
            encoder.spec["model"], pretrained=False, in_chans=encoder.input.channels, **options
        )


def _convert_older_names(layout: _Layout, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
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


def _place_tensors(encoder: Encoder, fit: _Fit, name: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Returns the tensors by the encoder's names, and the library's names of those adapted to other channels.

    Raises:
        ValueError: some are missing, have another shape, are not finite, or belong to layers that the encoder lacks.
    """
    own = encoder.state_dict()
    first = _name_first_convolution(encoder)
    fresh: dict[str, Tensor] = {}
    missing, other_shape, adapted = [], [], []
    for here, there in fit.layout.names.items():
        found, wanted = fit.tensors.get(there), own[here]
        if found is None:
            missing += [] if here.endswith(DERIVED_NAMES) else [f"{there!r} {tuple(wanted.shape)}"]
            continue
        if here == first and _differs_in_channels(found, wanted):
            found = _adapt_channels(encoder, found, wanted.shape[1], name)
            adapted.append(there)
        if found.shape != wanted.shape:
            other_shape.append(f"{there!r} {tuple(found.shape)} instead of {tuple(wanted.shape)}")
        elif found.is_floating_point() != wanted.is_floating_point() and not here.endswith(DERIVED_NAMES):
            raise ValueError(f"{name}: {there!r} has numbers of type {found.dtype}; valid: {wanted.dtype} and the like")
        elif found.is_floating_point() and not bool(torch.isfinite(found).all()):
            raise ValueError(f"{name}: {there!r} has numbers that are not finite")
        else:
            fresh[here] = found
    _check_fit(encoder, name, missing, other_shape, _list_foreign_layers(fit))
    return fresh, tuple(adapted)


def _differs_in_channels(found: Tensor, wanted: Tensor) -> bool:
    """Returns True if two weights of convolutions differ in the number of input channels, and in nothing else."""
    if found.ndim != wanted.ndim:
        return False
    (out, channels, *kernel), (own_out, own_channels, *own_kernel) = found.shape, wanted.shape
    return channels != own_channels and (out, kernel) == (own_out, own_kernel)


def _check_fit(
    encoder: Encoder, name: str, missing: Sequence[str], other_shape: Sequence[str], foreign: Sequence[str]
) -> None:
    problems = [
        (len(missing), "are missing", missing),
        (len(other_shape), "have another shape", other_shape),
        (len(foreign), "belong to layers that it lacks", foreign),
    ]
    words = [f"{count} {what}, first {', '.join(found[:2])}" for count, what, found in problems if count]
    if words:
        total, model = len(encoder.state_dict()), encoder.spec.get("model", encoder.spec["name"])
        raise ValueError(f"{name} does not fit {model}: of its {total} tensors {'; '.join(words)}")


def _list_foreign_layers(fit: _Fit) -> list[str]:
    """Returns the names in the file that stand beside the encoder's, as further layers of one of its stages.

    Heads stand alone, or are known to the library's network.
    """
    wanted = set(fit.layout.names.values())
    stages = {name.split(".")[0] for name in wanted}
    return [
        f"{name!r} {tuple(tensor.shape)}"
        for name, tensor in fit.tensors.items()
        if name not in wanted
        and name not in fit.layout.known
        and name.split(".")[0] in stages
        and not name.endswith(DERIVED_NAMES)
    ]


def _name_first_convolution(encoder: Encoder) -> str | None:
    """Returns the name of the weights of the convolution that takes the whole input."""
    for name, module in encoder.stages.named_modules(prefix="stages"):
        if isinstance(module, nn.Conv2d):
            return f"{name}.weight" if module.in_channels == encoder.input.channels else None
    return None


def _adapt_channels(encoder: Encoder, weight: Tensor, channels: int, name: str) -> Tensor:
    """Returns the weights of an input layer for another number of channels, as timm adapts them.

    A gray image is the sum of equal channels, and the other way round.

    Raises:
        ValueError: the channels of the encoder's input are no colours.
    """
    from timm.models import adapt_input_conv

    given, kind = weight.shape[1], encoder.spec.get("input", "rgb")
    if (given, kind) == (3, "gray"):
        return adapt_input_conv(1, weight)
    if (given, kind) == (1, "rgb"):
        return weight.repeat(1, channels, 1, 1) / channels
    raise ValueError(
        f"{name}: its first layer takes {given} channels, and encoder.input: {kind} gives {channels}; valid: rgb, gray"
    )


def _gives_finite_maps(encoder: Encoder) -> bool:
    training, device = encoder.training, next(encoder.parameters()).device
    generator, size = torch.Generator().manual_seed(0), encoder.image_size
    maps = encoder.eval()(torch.rand(2, 3, size, size, generator=generator).to(device))
    encoder.train(training)
    return all(bool(torch.isfinite(map_).all()) for map_ in maps)
