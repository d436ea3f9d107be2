"""The weights that `encoder.weights` names -> a saved encoder, with what is known of their origin."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstlight.pipeline.config.load import hash_json, parse_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import atomic_folder
from firstlight.pipeline.records import DamagedRecord
from firstlight.pipeline.run.input_colours import COLOUR_KEYS
from firstlight.pipeline.stages.artifacts.encoder_description import (
    WEIGHTS_ORIGIN_KEY,
    check_encoder_spec,
    check_whole_encoder,
    read_encoder_description,
    read_encoder_spec,
)
from firstlight.pipeline.stages.artifacts.encoder_folder import save_encoder
from firstlight.pipeline.stages.artifacts.weights_origin import TRACKED_PREFIXES
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.tracking.references import fetch_reference, find_source_run, pin_reference
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.input_normalization import RGB_CHANNELS
from firstlight.tasks.nn.weights.load_weights import LoadedWeights, load_weights
from firstlight.tasks.nn.weights.weight_sources import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    WeightSource,
    find_default_colours,
    find_weights,
)

WEIGHTS_KEY = "encoder.weights"
# The folder in the storage that holds them in this project's format, for all recipes.
WEIGHTS_FOLDER = "weights"
# The values that an error suggests if the input of weights is not known.
IMAGENET_COLOURS = {"mean": [*IMAGENET_MEAN], "std": [*IMAGENET_STD]}


@dataclass(frozen=True)
class GivenWeights:
    """A saved encoder with the weights that a recipe names."""

    folder: Path
    # The source as it is recorded: a pinned reference to MLflow, or the text of the recipe.
    reference: str
    # The MLflow run that made them, None if they are from elsewhere.
    run_id: str | None
    # The facts for MLflow and the model card, as texts.
    facts: dict[str, str]


def resolve_given(recipe: Recipe, tracking: TrackingClient) -> tuple[Recipe, GivenWeights | None, list[str]]:
    """Saves the given weights as an encoder of the recipe's network, in its storage.

    Returns the recipe with the colours that the weights were trained with, where it states none, the saved encoder, and
    lines about both; None and no lines if no stage uses given weights.

    Raises:
        UserError: there are no such weights, they are refused, or they do not fit the network; names `encoder.weights`.
    """
    if not recipe.takes_given:
        return recipe, None, []
    assert recipe.encoder is not None
    if recipe.encoder.weights.startswith(TRACKED_PREFIXES):
        return _fetch_tracked(recipe, tracking)
    try:
        source = find_weights(recipe.encoder.weights, recipe.network_spec)
    except ValueError as error:
        raise UserError(f"{WEIGHTS_KEY}: {error}") from None
    recipe, notes = _adopt_colours(recipe, *know_colours(recipe.network_spec, source))
    encoder = Encoder(recipe.network_spec, recipe.dataset.image_size)
    try:
        loaded = load_weights(encoder, source, recipe.encoder.part)
    except ValueError as error:
        raise UserError(f"{WEIGHTS_KEY}: {error}") from None
    facts = describe_origin(loaded)
    folder = save_once(recipe.storage, encoder, facts)
    assert recipe.encoder is not None
    # The licence that the recipe states is none of the facts that are saved: to state it later changes no result.
    stated = {"licence": recipe.encoder.licence} if recipe.encoder.licence else {}
    return (
        recipe,
        GivenWeights(folder, source.source, None, {**facts, **stated}),
        [f"{WEIGHTS_KEY}: {loaded.describe()}", *notes],
    )


def describe_origin(loaded: LoadedWeights) -> dict[str, str]:
    """Returns what is known of weights: the sha256 of their file, its layout and part, and the licence of its source.

    The path of a file is no part of it: the same weights elsewhere are the same.
    """
    licence = loaded.source.licence
    found = {"sha256": loaded.sha256, "layout": loaded.layout, "part": loaded.part, "licence": licence}
    return {key: value for key, value in found.items() if value}


def _fetch_tracked(recipe: Recipe, tracking: TrackingClient) -> tuple[Recipe, GivenWeights, list[str]]:
    """Downloads an encoder from MLflow."""
    assert recipe.encoder is not None
    reference = pin_reference(tracking, recipe.encoder.weights, WEIGHTS_KEY)
    folder = fetch_reference(
        tracking, reference, weights_folder(recipe.storage) / hash_json(reference)[:12], WEIGHTS_KEY
    )
    check_whole_encoder(folder, f"{WEIGHTS_KEY}: {recipe.encoder.weights!r}")
    spec = read_encoder_spec(folder)
    recipe, notes = _adopt_colours(recipe, {key: spec.get(key) for key in COLOUR_KEYS}, "as the encoder has them")
    check_encoder_spec(folder, recipe.network_spec, WEIGHTS_KEY)
    made_by = find_source_run(tracking, reference)
    given = GivenWeights(
        folder, reference, made_by, {"licence": recipe.encoder.licence} if recipe.encoder.licence else {}
    )
    return recipe, given, [f"{WEIGHTS_KEY}: {reference}, of run {made_by[:8]}", *notes]


def know_colours(spec: Mapping[str, Any], source: WeightSource) -> tuple[dict[str, Any], str]:
    """Returns the mean and standard deviation of the input of weights for the network `spec`, and who says so."""
    channels = spec.get("channels") or RGB_CHANNELS
    if source.mean is not None and source.std is not None and len(source.mean) == channels:
        return {"mean": list(source.mean), "std": list(source.std)}, "as the source of the weights has them"
    default = find_default_colours(spec)
    if default is not None and len(default[0]) == channels:
        return {"mean": list(default[0]), "std": list(default[1])}, f"usual for {default[2]}"
    return {}, ""


def _adopt_colours(recipe: Recipe, colours: Mapping[str, Any], words: str) -> tuple[Recipe, list[str]]:
    """Fills in `encoder.mean` and `encoder.std` where the recipe does not state them.

    Raises:
        UserError: they are not known.
    """
    encoder = recipe.encoder
    assert encoder is not None
    if encoder.normalize == "image":
        return recipe, []
    missing = [key for key in COLOUR_KEYS if key not in encoder.model_fields_set or getattr(encoder, key) is None]
    for key in missing:
        if colours.get(key) is None:
            raise UserError(
                f"encoder.{key}: is needed, since {WEIGHTS_KEY} does not say what its images were normalised by; "
                f"valid: {_describe_numbers(key, encoder.channels)}"
            )
    if not missing:
        return recipe, []
    filled = {key: colours[key] for key in missing}
    raw = recipe.dump()
    listed = ", ".join(f"encoder.{key}: {[round(v, 4) for v in value]}" for key, value in filled.items())
    return parse_recipe({**raw, "encoder": {**raw["encoder"], **filled}}), [f"{listed}, {words}"]


def _describe_numbers(key: str, channels: int | None) -> str:
    if channels in (None, RGB_CHANNELS):
        return f"three numbers, of ImageNet {IMAGENET_COLOURS[key]}"
    return f"{channels} numbers, one for each channel of the images"


def weights_folder(storage: Path) -> Path:
    return storage.resolve() / WEIGHTS_FOLDER


def save_once(storage: Path, encoder: Encoder, facts: dict[str, str]) -> Path:
    """Saves the encoder, unless it was saved before. Another process may do the same at the same time."""
    decides = [encoder.spec, encoder.image_size, facts]
    folder = weights_folder(storage) / hash_json(decides)[:12]
    try:
        read_encoder_description(folder)
        return folder
    except (UserError, DamagedRecord):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        with atomic_folder(folder) as part:
            save_encoder(encoder, part, {WEIGHTS_ORIGIN_KEY: facts})
    except OSError:
        if not folder.exists():
            raise
        read_encoder_description(folder)
    return folder
