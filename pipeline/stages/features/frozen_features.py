"""Frozen features of a network with the weights that a stage compares: pretrained, given and random."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from firstlight.pipeline.config.comparison import FeatureStage
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.stages import GIVEN, RANDOM
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.artifacts.companions import load_head
from firstlight.pipeline.stages.artifacts.encoder_folder import load_encoder
from firstlight.pipeline.stages.features.kept_features import KeptFeatures, group_places
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.backward_pass import find_autocast
from firstlight.pipeline.train.context import StageContext, gather_rows
from firstlight.pipeline.train.metrics import PassProgress
from firstlight.tasks.collective import world_size
from firstlight.tasks.nn.encoders import Encoder, pooled_size
from firstlight.tasks.nn.feature_extractor import FeatureExtractor
from firstlight.tasks.nn.heads import Projection


def build_extractors(
    context: StageContext, stage: FeatureStage, instance: StageInstance
) -> dict[str, FeatureExtractor]:
    """Builds the network of each arm of a stage in evaluation mode. Random weights are drawn from the seed."""
    made, autocast = {}, find_autocast(stage.precision, context.device)
    for arm in stage.compared_arms:
        encoder, head = _load_arm(context, instance, arm)
        network = FeatureExtractor(encoder, head, stage.feature_layers, stage.pool, autocast)
        made[arm] = prepare_for_inference(network, context.device)
    return made


def prepare_for_inference(network: FeatureExtractor, device: torch.device) -> FeatureExtractor:
    """Moves a network to a device, in evaluation mode.

    Its convolutions take the memory format `channels_last`, with which most networks need half to nine tenths of the
    time, on a CPU too.
    """
    return network.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload,no-any-return]


def _load_arm(context: StageContext, instance: StageInstance, arm: str) -> tuple[Encoder, Projection | None]:
    """Returns the encoder of an arm, and its head if the features are those of a head."""
    size = context.recipe.dataset.image_size
    head = load_head(instance.companions["head"]) if "head" in instance.companions else None
    if arm == RANDOM:
        torch.manual_seed(instance.seed)
        fresh = Encoder(context.recipe.network_spec, size)
        return fresh, Projection(**head.spec) if head else None
    folder = instance.given if arm == GIVEN else instance.encoder
    assert folder is not None
    return load_encoder(folder, size), head


@torch.no_grad()
def compute_features(
    context: StageContext,
    networks: Mapping[str, FeatureExtractor],
    ids: np.ndarray,
    instance: StageInstance,
    batch_size: int,
) -> dict[str, list[Tensor]]:
    """Returns the (n, d) features of `ids`, in their order, for each network and layer, on every worker.

    It is collective. Every image is decoded once for all networks, and not at all where an earlier stage of the run has
    kept its features (`KeptFeatures`).
    """
    progress = PassProgress(instance.folder, len(ids))
    kept = KeptFeatures(context, instance, networks, batch_size)
    groups = group_places(context.splits, ids, world_size())
    found: dict[str, list[list[Tensor]]] = {name: [] for name in networks}
    for places in groups:
        part = kept.load(ids[places])
        missing = {name: network for name, network in networks.items() if name not in part}
        part |= _compute_group(context, missing, ids[places], batch_size, progress)
        for name in missing:
            kept.save(name, ids[places], part[name])
        for name, layers in part.items():
            found[name].append(layers)
    order = torch.from_numpy(np.argsort(np.concatenate(groups))).to(context.device)
    return {name: [torch.cat(rows)[order] for rows in zip(*parts, strict=True)] for name, parts in found.items()}


def _compute_group(
    context: StageContext,
    networks: Mapping[str, FeatureExtractor],
    ids: np.ndarray,
    batch_size: int,
    progress: PassProgress,
) -> dict[str, list[Tensor]]:
    """Computes the (n, d) features of some images for each network and layer. It is collective."""
    if not networks:
        progress.add_images(-(-len(ids) // world_size()))
        return {}
    parts: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in networks}
    for batch in context.iterate_batches(ids, batch_size):
        for name, network in networks.items():
            parts[name].append(network(batch.views[0]))
        progress.add_images(len(batch.ids))
    return {
        name: [gather_rows(layer, len(ids)) for layer in zip(*batches, strict=True)] for name, batches in parts.items()
    }


def check_head(head: Projection, recipe: Recipe, where: str) -> None:
    """Checks that a head fits the recipe's encoder.

    Raises:
        UserError: it takes features of another size; the message names both sizes.
    """
    size = pooled_size(Encoder(recipe.network_spec, recipe.dataset.image_size), head.pool)
    if size != head.spec["size"]:
        raise UserError(
            f"{where}.features: the head takes {head.spec['size']} features, the encoder gives {size} for images of "
            f"{recipe.dataset.image_size} pixels (dataset.image_size); valid: features: encoder"
        )
