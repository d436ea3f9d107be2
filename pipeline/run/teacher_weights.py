"""The weights of frozen networks that pretrainings learn from -> saved encoders, with what is known of their origin."""

from pathlib import Path
from typing import Any

from firstlight.pipeline.config.load import hash_json
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schema import WEIGHT_KEYS
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.given_weights import (
    IMAGENET_COLOURS,
    GivenWeights,
    describe_origin,
    know_colours,
    save_once,
    weights_folder,
)
from firstlight.pipeline.run.input_colours import COLOUR_KEYS
from firstlight.pipeline.stages.artifacts.encoder_description import check_encoder_spec, check_whole_encoder
from firstlight.pipeline.stages.artifacts.weights_origin import TRACKED_PREFIXES
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.tracking.references import fetch_reference, find_source_run, pin_reference
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.weights.load_weights import load_weights
from firstlight.tasks.nn.weights.weight_sources import VALID_SOURCES, WeightSource, find_weights


def resolve_teachers(recipe: Recipe, tracking: TrackingClient) -> tuple[dict[str, GivenWeights], list[str]]:
    """Saves the teacher of each stage that has one as an encoder, in the recipe's storage.

    Returns the saved encoders by stage, and lines about them.

    Raises:
        UserError: a teacher has no weights, they are refused, or do not fit its network; names the key.
    """
    found, notes = dict[str, GivenWeights](), list[str]()
    for name, stage in recipe.stages.items():
        if stage.teacher is not None:
            where = f"stages.{name}.method.teacher"
            size = stage.choose_teacher_size(recipe.dataset.image_size)
            found[name], line = _resolve_teacher(where, stage.teacher, size, recipe.storage, tracking)
            notes.append(line)
    return found, notes


def _resolve_teacher(
    where: str, section: Any, image_size: int, storage: Path, tracking: TrackingClient
) -> tuple[GivenWeights, str]:
    key, spec = f"{where}.weights", section.model_dump(mode="json", exclude=set(WEIGHT_KEYS))
    if section.weights is None:
        raise UserError(f"{key}: is needed: a network of random weights has nothing to teach; valid: {VALID_SOURCES}")
    stated = {"licence": section.licence} if section.licence else {}
    if section.weights.startswith(TRACKED_PREFIXES):
        reference = pin_reference(tracking, section.weights, key)
        folder = fetch_reference(tracking, reference, weights_folder(storage) / hash_json(reference)[:12], key)
        check_whole_encoder(folder, f"{key}: {section.weights!r}")
        check_encoder_spec(folder, spec, key)
        made_by = find_source_run(tracking, reference)
        return GivenWeights(folder, reference, made_by, stated), f"{key}: {reference}, of run {made_by[:8]}"
    try:
        source = find_weights(section.weights, spec)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from None
    encoder = Encoder({**spec, **_choose_colours(where, section, spec, source)}, image_size)
    try:
        loaded = load_weights(encoder, source, section.part)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from None
    facts = describe_origin(loaded)
    given = GivenWeights(save_once(storage, encoder, facts), source.source, None, {**facts, **stated})
    return given, f"{key}: {loaded.describe()}"


def _choose_colours(where: str, section: Any, spec: dict[str, Any], source: WeightSource) -> dict[str, Any]:
    """Returns the colours that the weights expect, where the section does not state them.

    Raises:
        UserError: they are not known.
    """
    missing = [key for key in COLOUR_KEYS if key not in section.model_fields_set or spec.get(key) is None]
    if section.normalize == "image" or not missing:
        return {}
    known, _ = know_colours(spec, source)
    for key in missing:
        if known.get(key) is None:
            raise UserError(
                f"{where}.{key}: is needed, since {where}.weights does not say what its images were normalised by; "
                f"valid: three numbers, of ImageNet {IMAGENET_COLOURS[key]}"
            )
    return {key: known[key] for key in missing}
