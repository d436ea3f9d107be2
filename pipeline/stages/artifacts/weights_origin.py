"""The existing weights that a saved network comes from."""

from pathlib import Path

from firstlight.pipeline.config.measures import GIVEN_ARM, is_pretrained_arm
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.stages.artifacts.encoder_description import WEIGHTS_ORIGIN_KEY, read_encoder_description
from firstlight.tasks.nn.weights.weight_sources import name_weights

TRACKED_PREFIXES = ("runs:/", "models:/")


def trace_weights(recipe: Recipe, name: str, folder: Path, arm: str | None = None) -> dict[str, str]:
    """Returns what is known of the existing weights that a saved network comes from; {} if it comes from none.

    Args:
        name: the stage of the recipe that made the network, starts from it, or hands it on.
        folder: that of the network.
        arm: the arm of the fine-tuning that starts from it; None: the arm that made the network, if it was fine-tuned.

    Raises:
        UserError: as `read_encoder_spec`.
    """
    description = read_encoder_description(folder)
    saved = description.get(WEIGHTS_ORIGIN_KEY)
    known = {key: text for key, text in saved.items() if isinstance(text, str)} if isinstance(saved, dict) else {}
    if recipe.encoder is None or not _comes_from_given(recipe, name, arm or description.get("arm")):
        return known
    source, licence = recipe.encoder.weights or "", recipe.encoder.licence
    if not known and not licence and source.startswith(TRACKED_PREFIXES):
        # An encoder of an earlier recipe, which began with fresh weights.
        return {}
    origin = {"source": name_weights(source, recipe.network_spec), **known}
    return {**origin, "licence": licence} if licence else origin


def trace_teacher(folder: Path, source: str) -> dict[str, str]:
    """Returns what is known of the weights of a saved teacher, which a recipe names as `source`."""
    description = read_encoder_description(folder)
    saved = description.get(WEIGHTS_ORIGIN_KEY)
    known = {key: text for key, text in saved.items() if isinstance(text, str)} if isinstance(saved, dict) else {}
    return {"source": name_weights(source, description["spec"]), **known}


def _comes_from_given(recipe: Recipe, name: str, arm: str | None) -> bool:
    """Returns True if the network of a stage comes from the weights that the recipe names."""
    if recipe.stages[name].makes_model and arm is not None and not is_pretrained_arm(arm):
        return arm == GIVEN_ARM
    source = recipe.encoder_source(name)
    if source is None or source.stage is None:
        return source is not None and source.is_given
    return _comes_from_given(recipe, source.stage, arm)
