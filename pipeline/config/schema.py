"""Sections of a recipe whose keys are the parameters of registered functions and classes.

A method, task, encoder or augmentation declares its settings once, as the keyword-only parameters of its constructor or
function. Annotations are the types and ranges of the keys, defaults their defaults, and docstrings their meanings.
"""

import json
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
from pydantic import AfterValidator, Field, TypeAdapter, create_model

from firstlight.pipeline.config.schemas.entries import NETWORK_TYPE, describe_registry, load_entries
from firstlight.pipeline.config.schemas.parameter_types import decode_default, decode_type
from firstlight.pipeline.config.schemas.strict_model import StrictModel
from firstlight.pipeline.data.augment.ops import CROP_OPS, OPS, list_ten_crops, list_windows
from firstlight.pipeline.data.sources import SOURCES
from firstlight.pipeline.errors import UserError

Element = TypeVar("Element")


def _entry_fields(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of an entry of a registry as fields of a model."""
    fields = {}
    for name, parameter in entry["parameters"].items():
        # A hyper-parameter that is a network has the keys of the section `encoder`.
        hint = EncoderSpec if parameter["type"] == NETWORK_TYPE else decode_type(parameter["type"], {})
        default = decode_default(parameter["default"]) if "default" in parameter else ...
        fields[name] = (Annotated[hint, Field(description=parameter["meaning"])], default)
    return fields


def _tagged_union(entries: Mapping[str, Mapping[str, Any]], tag: str, **shared: Any) -> Any:
    """Returns the union of the models of a registry's entries; the value of the key `tag` picks the model.

    `shared`: fields that every model has besides its own.

    Raises:
        UserError: an entry, of an installed package, has a parameter with the name of a shared field.
    """
    for name, entry in entries.items():
        if twice := sorted(shared.keys() & entry["parameters"].keys()):
            raise UserError(
                f"{tag}: {name} has the parameter {', '.join(twice)}, which every entry has: it needs another name"
            )
    models = [
        create_model(  # type: ignore[call-overload]
            f"{tag}_{name}",
            __base__=StrictModel,
            __doc__=entry["text"],
            **{tag: (Literal[name], Field(description="The name of the entry."))},
            **shared,
            **_entry_fields(entry),
        )
        for name, entry in entries.items()
    ]
    return Annotated[reduce(or_, models), Field(discriminator=tag)] if len(models) > 1 else models[0]


# The keys of the section `encoder` that say where its weights come from; the others are the spec of the network.
WEIGHT_FIELDS: dict[str, Any] = {
    "weights": (
        str | None,
        Field(
            None,
            min_length=1,
            description="Existing weights: a file (.safetensors, or .pth, .pt, .bin, .ckpt, of which only tensors are "
            "read), a folder of an export, `timm` or `timm:<tag>`, `torchvision` or `torchvision:<weights>`, "
            "`hf-hub:<owner>/<name>`, `local-dir:<folder>`, `runs:/<run>/encoder` or `models:/<name>@<alias>`. A "
            "pretraining continues from them, and they are the arm `given` of the other stages "
            "([weights](weights.md)). null: there are none.",
        ),
    ),
    "part": (
        str | None,
        Field(
            None,
            min_length=1,
            description="The part of a checkpoint that holds the network, such as `student`, where it holds several. "
            "null: the first of the usual ones ([weights](weights.md)).",
        ),
    ),
    "licence": (
        str | None,
        Field(
            None,
            min_length=1,
            description="The licence of the weights, for the model card. null: as the source states it, if it does.",
        ),
    ),
}
WEIGHT_KEYS = tuple(WEIGHT_FIELDS)

# The unions are built from the registries, which a type checker cannot follow.
if TYPE_CHECKING:
    AugmentOp: TypeAlias = Any
    MethodSpec: TypeAlias = Any
    TaskSpec: TypeAlias = Any
    EncoderSpec: TypeAlias = Any
    EncoderSection: TypeAlias = Any
    SourceName: TypeAlias = str
else:
    ENTRIES = load_entries()
    AugmentOp = _tagged_union(describe_registry(OPS, {}), "op")
    EncoderSpec = _tagged_union(
        ENTRIES["encoders"], "name", **_entry_fields(ENTRIES["shared"]["shared"]), **WEIGHT_FIELDS
    )
    EncoderSection = EncoderSpec | None
    MethodSpec = _tagged_union(ENTRIES["methods"], "name")
    TaskSpec = _tagged_union(ENTRIES["tasks"], "name")
    SourceName = Literal[tuple(SOURCES)]
Augment = tuple[AugmentOp, ...]


class View(NamedTuple):
    """One view of an image."""

    augment: Augment
    # The side in pixels.
    size: int


def check_augment(ops: Augment) -> Augment:
    """Returns `ops`. Raises ValueError unless they start with a crop of one side and have no other."""
    crops = [op.op for op in ops if op.op in CROP_OPS]
    if len(crops) != 1 or ops[0].op not in CROP_OPS:
        raise ValueError(f"must start with exactly one of {', '.join(sorted(CROP_OPS))} (found {crops or 'none'})")
    for op in ops:
        _check_parameters(op)
    return ops


def _check_parameters(op: AugmentOp) -> None:
    """Raises ValueError for parameters of an op that are valid alone, but not together."""
    scale, size = (getattr(op, key, None) for key in ("scale", "size"))
    if scale is not None and size is not None:
        raise ValueError(f"{op.op} has scale: {scale} and size: {size}; valid: one of them")
    bins, magnitude = (getattr(op, key, 0) for key in ("num_magnitude_bins", "magnitude"))
    if magnitude and magnitude >= bins and op.magnitudes == "fixed":
        raise ValueError(
            f"{op.op} has magnitude: {magnitude} and num_magnitude_bins: {bins}; valid: a magnitude of 0 to {bins - 1}"
        )


# A field of a section: `Augment` after `check_augment`.
CheckedAugment = Annotated[Augment, AfterValidator(check_augment)]


def parse_augment(ops: object) -> Augment:
    """Returns augmentations from plain values, with all defaults.

    Raises:
        ValueError: they are not valid.
    """
    return check_augment(TypeAdapter(Augment).validate_json(json.dumps(ops)))


def build_ten_crops(scale: float | None, size: int | None) -> list[Augment]:
    """Returns the augmentations of ten-crop evaluation: four corners and the centre, then their mirror images.

    `scale`: the side of a crop as a fraction of the image's shorter side. `size`: its side in pixels. At most one of
    the two is given.
    """
    return _parse_views(list_ten_crops(scale, size))


def build_windows(sizes: np.ndarray, scale: float | None, size: int | None) -> list[Augment]:
    """Returns the augmentations of the windows that cover images of (n, 2) widths and heights.

    `scale` and `size` are as for `build_ten_crops`.
    """
    return _parse_views(list_windows(sizes, scale, size))


def _parse_views(views: Sequence[Sequence[Mapping[str, Any]]]) -> list[Augment]:
    return [TypeAdapter(Augment).validate_json(json.dumps(ops)) for ops in views]


def constructor_arguments(spec: Any) -> dict[str, Any]:
    """Returns the keyword arguments of the class that the section of a method or task names."""
    return {key: value for key, value in spec.model_dump().items() if key != "name"}


def check_distinct(values: tuple[Element, ...], what: str) -> tuple[Element, ...]:
    """Returns `values`. Raises ValueError if one occurs twice; the message calls a value `what`."""
    if len(set(values)) != len(values):
        raise ValueError(f"must not repeat {what}")
    return values
