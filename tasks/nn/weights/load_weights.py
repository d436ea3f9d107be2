"""Loads weights of any known layout into an encoder, or says in one line why they do not fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.weights.checkpoint_files import StateDictFile, read_state_dict
from firstlight.tasks.nn.weights.key_matching import drop_compiler_names
from firstlight.tasks.nn.weights.tensor_layouts import FittedTensors, fit_layouts
from firstlight.tasks.nn.weights.weight_sources import WeightSource

# Tensors that follow from the network's sizes, or count batches: they may be missing or left over.
DERIVED_NAMES = ("num_batches_tracked", "relative_position_index", "attn_mask", "relative_coords_table")


@dataclass(frozen=True)
class LoadedWeights:
    """Facts about loaded weights: their source, and what became of each tensor.

    Names of tensors are those of the file, without their prefix.
    """

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
    fit = fit_layouts(encoder, drop_compiler_names(file.tensors), name)
    fresh, adapted = _place_tensors(encoder, fit, name)
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    encoder.load_state_dict({**before, **fresh})
    if not _gives_finite_maps(encoder):
        encoder.load_state_dict(before)
        raise ValueError(f"{name}: the feature maps of an image of noise are not finite with these weights")
    return _describe_loaded(source, file, fit, fresh, adapted)


def _describe_loaded(
    source: WeightSource, file: StateDictFile, fit: FittedTensors, fresh: Mapping[str, Tensor], adapted: tuple[str, ...]
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


def _names_elsewhere(file: StateDictFile, fit: FittedTensors, behind: set[str]) -> set[str]:
    """Returns the names in the file that do not have the prefix of the network."""
    return {name for name in drop_compiler_names(file.tensors) if not name.startswith(fit.prefix.text)} - behind


def _place_tensors(encoder: Encoder, fit: FittedTensors, name: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
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


def _list_foreign_layers(fit: FittedTensors) -> list[str]:
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
    if (given, kind) == (3, "rgb"):
        # The colours are repeated as often as the channels take, and a gray image is still their sum.
        return adapt_input_conv(channels, weight)
    if (given, kind) == (1, "rgb"):
        return weight.repeat(1, channels, 1, 1) / channels
    raise ValueError(
        f"{name}: its first layer takes {given} channels, and encoder.input: {kind} gives {channels}; valid: rgb, gray"
    )


def _gives_finite_maps(encoder: Encoder) -> bool:
    training, device = encoder.training, next(encoder.parameters()).device
    generator, size = torch.Generator().manual_seed(0), encoder.image_size
    maps = encoder.eval()(torch.rand(2, encoder.image_channels, size, size, generator=generator).to(device))
    encoder.train(training)
    return all(bool(torch.isfinite(map_).all()) for map_ in maps)
