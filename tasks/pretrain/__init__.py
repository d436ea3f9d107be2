"""Pretraining methods by name, one page each."""

from collections.abc import Mapping
from typing import Any

from firstlight.tasks.extensions.registry import Registry
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.pretrain.byol import Byol
from firstlight.tasks.pretrain.clustering_locality import ClusteringLocality
from firstlight.tasks.pretrain.dae import DenoisingAutoEncoder
from firstlight.tasks.pretrain.dino import Dino
from firstlight.tasks.pretrain.distill import Distillation
from firstlight.tasks.pretrain.fixmatch import FixMatch
from firstlight.tasks.pretrain.lejepa import LeJepa
from firstlight.tasks.pretrain.mae import MaskedAutoEncoder
from firstlight.tasks.pretrain.method import BatchRequirements, Method, TrainingInfo, ViewGroup
from firstlight.tasks.pretrain.nat import NoiseAsTargets
from firstlight.tasks.pretrain.simclr import SimClr
from firstlight.tasks.pretrain.spatial_contrasting import SpatialContrasting
from firstlight.tasks.pretrain.super_and import SuperAnd
from firstlight.tasks.pretrain.vicreg import VicReg
from firstlight.tasks.visuals import Plot

_OWN_METHODS: dict[str, type[Method]] = {
    "nat": NoiseAsTargets,
    "spatial_contrasting": SpatialContrasting,
    "clustering_locality": ClusteringLocality,
    "dae": DenoisingAutoEncoder,
    "super_and": SuperAnd,
    "dino": Dino,
    "simclr": SimClr,
    "byol": Byol,
    "vicreg": VicReg,
    "lejepa": LeJepa,
    "mae": MaskedAutoEncoder,
    "fixmatch": FixMatch,
    "distill": Distillation,
}
METHODS = Registry("methods", _OWN_METHODS, Method)


def build_method(name: str, encoder: Encoder, info: TrainingInfo, parameters: Mapping[str, Any]) -> Method:
    """Returns the method `name` around `encoder`. Hyper-parameters that `parameters` lacks have their defaults.

    Raises:
        ValueError: the parameters do not fit the encoder or the training; the message starts with the parameter's name.
    """
    return METHODS[name](encoder, info, **parameters)


def batch_requirements(name: str, parameters: Mapping[str, Any]) -> BatchRequirements:
    """Returns what every batch must hold for the method `name` with these hyper-parameters."""
    method = METHODS[name]
    return method.requirements(method.complete_parameters(parameters))


def default_views(
    name: str, augment: tuple[Mapping[str, Any], ...], image_size: int, parameters: Mapping[str, Any]
) -> tuple[ViewGroup, ...]:
    """Returns the views of an image that the method `name` makes of the augmentations `augment`."""
    method = METHODS[name]
    return method.default_views(augment, image_size, method.complete_parameters(parameters))


def check_method_length(name: str, epochs: int, ends_partial: bool, parameters: Mapping[str, Any]) -> None:
    """Checks the length of a training by the method `name`, as `Method.check_length` does.

    Raises:
        ValueError: the message starts with the parameter's name.
    """
    method = METHODS[name]
    method.check_length(epochs, ends_partial, method.complete_parameters(parameters))


def check_method_images(name: str, images: int, parameters: Mapping[str, Any]) -> None:
    """Checks the number of images of a training by the method `name`, as `Method.check_images` does.

    Raises:
        ValueError: the message starts with the parameter's name.
    """
    method = METHODS[name]
    method.check_images(images, method.complete_parameters(parameters))


def list_method_warnings(name: str, parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns sentences about hyper-parameters of the method `name` that are known to fail."""
    method = METHODS[name]
    return method.list_warnings(method.complete_parameters(parameters))


def metric_plots(name: str, epochs: int, parameters: Mapping[str, Any]) -> tuple[Plot, ...]:
    """Returns the plots that the method `name` with these hyper-parameters wants of a training of `epochs` epochs."""
    method = METHODS[name]
    return method.plots(epochs, method.complete_parameters(parameters))
