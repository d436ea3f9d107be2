"""Frozen features of the pretrained network, and of the same network with random weights."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.stages import FeatureStage
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.artifacts import load_encoder, load_head
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext, gather_rows
from firstlight.pipeline.train.metrics import PassProgress
from firstlight.tasks.nn.encoders import Encoder, pooled_size
from firstlight.tasks.nn.feature_extractor import FeatureExtractor
from firstlight.tasks.nn.heads import Projection

FEATURE_ARMS = ("pretrained", "random")


def build_extractors(
    context: StageContext, stage: FeatureStage, instance: StageInstance
) -> dict[str, FeatureExtractor]:
    """Builds both networks in evaluation mode. The random weights, of encoder and head, are drawn from the seed."""
    size = context.recipe.dataset.image_size
    assert instance.encoder is not None
    encoder = load_encoder(instance.encoder, size)
    head = load_head(instance.companions["head"]) if "head" in instance.companions else None
    torch.manual_seed(instance.seed)
    fresh = Encoder(context.recipe.encoder.model_dump(), size)
    fresh_head = Projection(**head.spec) if head else None
    made = (
        FeatureExtractor(encoder, head, stage.feature_layers, stage.pool),
        FeatureExtractor(fresh, fresh_head, stage.feature_layers, stage.pool),
    )
    return {arm: features.to(context.device).eval() for arm, features in zip(FEATURE_ARMS, made, strict=True)}


@torch.no_grad()
def compute_features(
    context: StageContext,
    networks: Mapping[str, FeatureExtractor],
    ids: np.ndarray,
    instance: StageInstance,
    batch_size: int,
) -> dict[str, list[Tensor]]:
    """Returns the (n, d) features of `ids`, in their order, for each network and layer, on every worker.

    Collective. Every image is decoded once for all networks.
    """
    progress = PassProgress(instance.folder, len(ids))
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
    size = pooled_size(Encoder(recipe.encoder.model_dump(), recipe.dataset.image_size), head.pool)
    if size != head.spec["size"]:
        raise UserError(
            f"{where}.features: the head takes {head.spec['size']} features, the encoder gives {size} for images of "
            f"{recipe.dataset.image_size} pixels (dataset.image_size); valid: features: encoder"
        )


def describe_features(stage: FeatureStage) -> list[str]:
    """Returns words for the features of each layer of a stage; "" for those of the deepest map alone."""
    if stage.features == "head":
        return ["head"]
    return ["" if stage.feature_layers == (-1,) else f"layer {layer}" for layer in stage.feature_layers]


def label_features(measure: str, *details: str) -> str:
    """Returns what tables call a measure of features: `kNN (k=20, layer 2)`."""
    text = ", ".join(detail for detail in details if detail)
    return f"{measure} ({text})" if text else measure
