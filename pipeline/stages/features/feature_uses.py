"""The frozen features that stages of a recipe take of the same weights, by what says so before anything is computed."""

from dataclasses import dataclass

from firstlight.pipeline.config.measures import GIVEN_ARM, PRETRAINED_ARM
from firstlight.pipeline.config.recipe import EncoderSource, Recipe
from firstlight.pipeline.config.scale import ScaleOptions


@dataclass(frozen=True)
class FeatureUse:
    """Features of one layer of some weights, as a stage takes them."""

    # The origin of the weights: that of the encoder, or the name of an arm that all stages have in common.
    weights: EncoderSource | str
    head: bool
    pool: str
    layer: int
    batch_size: int
    precision: str

    @property
    def is_of_every_seed(self) -> bool:
        """True if the weights are the same ones for all seeds."""
        return self.weights == GIVEN_ARM or (isinstance(self.weights, EncoderSource) and self.weights.stage is None)


def takes_kept_embeddings(scale: ScaleOptions) -> bool:
    """Returns True if embeddings are computed as the features of other stages are: on this machine, by one process.

    Several workers have other batches than embeddings. The processes of a cluster may be on any machine.
    """
    return scale.max_workers == 0 or (scale.max_workers == 1 and scale.address == "local" and not scale.worker_gpus)


def list_feature_uses(recipe: Recipe, name: str) -> dict[str, list[FeatureUse]]:
    """Returns what the stage `name` takes of each arm, for each of its layers; {} if it takes no frozen features."""
    taken = recipe.stages[name].list_frozen_features(takes_kept_embeddings(recipe.scale))
    if taken is None:
        return {}
    shared = (taken.batch_size, taken.precision)
    return {
        arm: [
            FeatureUse(_name_weights(recipe, name, arm), taken.head, taken.pool, layer, *shared)
            for layer in taken.layers
        ]
        for arm in taken.arms
    }


def _name_weights(recipe: Recipe, name: str, arm: str) -> EncoderSource | str:
    source = recipe.encoder_source(name) if arm == PRETRAINED_ARM else None
    if source is None:
        return arm
    return GIVEN_ARM if source.is_given else source


def list_later_uses(recipe: Recipe, name: str, seed: int) -> frozenset[FeatureUse]:
    """Returns what is taken after the stage `name` has done `seed`: by later stages, and by itself for later seeds."""
    names, seeds = list(recipe.stages), list(recipe.seeds)
    later = [
        use
        for other in names[names.index(name) + 1 :]
        for uses in list_feature_uses(recipe, other).values()
        for use in uses
    ]
    if seed in seeds[:-1]:
        later += [use for uses in list_feature_uses(recipe, name).values() for use in uses if use.is_of_every_seed]
    return frozenset(later)
