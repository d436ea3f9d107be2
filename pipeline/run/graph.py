"""The stage graph of a recipe: the encoder that each stage starts from, and the folder of each stage and seed.

A folder is named by a hash of all that decides the result of the stage.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firstlight.pipeline.config.load import hash_json
from firstlight.pipeline.config.recipe import EncoderSource, Recipe
from firstlight.pipeline.config.stages import PREVIOUS
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.artifacts import check_encoder_spec, load_companion, read_encoder_spec
from firstlight.pipeline.stages.code_version import code_version
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.stages.stage import StageInstance, TrainingSegment
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.tracking.references import fetch_reference, find_companion, pin_reference

# The key of a stage that asks for a network besides the encoder.
COMPANION_KEYS = {"head": "features", "decoder": "arms"}


@dataclass
class ResolvedReferences:
    """The downloaded encoders and other networks that a recipe takes from MLflow, by the name of the stage."""

    # The pinned reference of the encoder, and the folder that it was downloaded to.
    encoders: dict[str, tuple[str, Path]] = field(default_factory=dict)
    # The folder of the head or decoder that belongs to that encoder.
    companions: dict[str, Path] = field(default_factory=dict)


def resolve_references(recipe: Recipe, tracking: TrackingClient, inputs: Path, only: str | None) -> ResolvedReferences:
    """Downloads the encoders that the stages refer to, with their companions, into folders below `inputs`.

    `only`: the kind of the stages that will run; None for all.

    Raises:
        UserError: a model does not exist, or does not fit the recipe.
    """
    found = ResolvedReferences()
    for name, stage in recipe.stages.items():
        source = recipe.encoder_source(name)
        if source is None or source.reference is None or only not in (None, stage.kind):
            continue
        where = f"stages.{name}.encoder"
        reference = pin_reference(tracking, source.reference, where)
        folder = fetch_reference(tracking, reference, inputs / hash_json(reference)[:12], where)
        check_encoder_spec(folder, recipe.encoder.model_dump(mode="json"), where)
        found.encoders[name] = (reference, folder)
        if stage.companion:
            found.companions[name] = _fetch_companion(recipe, name, reference, tracking, inputs)
    return found


def _fetch_companion(recipe: Recipe, name: str, reference: str, tracking: TrackingClient, inputs: Path) -> Path:
    """Downloads the network that a stage needs besides the referenced encoder, and checks it. Returns its folder."""
    stage = recipe.stages[name]
    assert stage.companion is not None
    key = f"stages.{name}.{COMPANION_KEYS[stage.companion]}"
    other = find_companion(tracking, reference, stage.companion, key)
    folder = fetch_reference(tracking, other, inputs / hash_json(other)[:12], key)
    stage_kind(stage).check_companion(name, stage, recipe, folder)
    return folder


@dataclass(frozen=True)
class StageGraph:
    """The stages of a recipe with their files in `folder`, on the images of the store with the hash `store`."""

    recipe: Recipe
    folder: Path
    store: str
    references: ResolvedReferences
    segment: TrainingSegment | None = None

    def find_instance(self, name: str, seed: int) -> StageInstance:
        """Returns the instance of a stage and seed.

        Its folder is named by a hash of all that decides the result; the number of workers does not.

        Raises:
            UserError: the encoder that it starts from is missing or damaged.
        """
        recipe, stage = self.recipe, self.recipe.stages[name]
        settings = stage.model_dump(mode="json")
        decides: dict[str, Any] = {
            "stage": {key: value for key, value in settings.items() if key not in stage.keys_without_effect},
            "dataset": recipe.dataset.model_dump(mode="json", exclude={"root", "download", "extends"}),
            "encoder": recipe.encoder.model_dump(mode="json"),
            "order": recipe.stream.model_dump(include={"window", "shuffle"}),
            "seed": seed,
            "store": self.store,
            "code": code_version(type(stage_kind(stage))),
            "score_test": recipe.score_test,
        }
        source = recipe.encoder_source(name)
        encoder = companion = None
        if source is not None:
            encoder = self._find_encoder(name, source, seed)
            decides["from"] = _hash_manifest(encoder)
        if source is not None and stage.companion:
            companion = self._find_companion(name, source, stage.companion, seed)
            decides[stage.companion] = _hash_manifest(companion)
        segment = self.segment if self.segment and self.segment.stage == name else TrainingSegment(name)
        if segment.before:
            decides["before"] = segment.before
        fingerprint = hash_json(decides)[:12]
        folder = self.folder / f"{name}-seed{seed}-{fingerprint}"
        return StageInstance(name, seed, fingerprint, folder, encoder, companion, segment.begin, segment.until)

    def _find_encoder(self, name: str, source: EncoderSource, seed: int) -> Path:
        """Returns the folder of the encoder that a stage starts from, its files checked."""
        if source.stage is None:
            return self.references.encoders[name][1]
        upstream = self.find_upstream(name, seed)
        try:
            read_encoder_spec(upstream.folder / "encoder")
        except UserError as error:
            raise UserError(
                f"{error}; delete {upstream.folder} and run again: {upstream.label} is trained again from its seed"
            ) from None
        return upstream.folder / "encoder"

    def _find_companion(self, name: str, source: EncoderSource, wanted: str, seed: int) -> Path:
        """Returns the folder of the network that a stage needs besides its encoder, its files checked."""
        if source.stage is None:
            folder = self.references.companions[name]
        else:
            folder = self.find_upstream(name, seed).folder / wanted
        load_companion(folder, wanted)
        return folder

    def find_upstream(self, name: str, seed: int) -> StageInstance:
        """Returns the finished instance whose encoder the stage `name`, which has `encoder: previous`, starts from.

        Raises:
            UserError: it has not finished.
        """
        source = self.recipe.encoder_source(name)
        assert source is not None
        assert source.stage is not None
        instance = self.find_instance(source.stage, seed)
        if instance.result is None:
            raise UserError(
                f"stages.{name}.encoder: {PREVIOUS!r} is {instance.label}, which has not finished; run it first: "
                "firstlight pretrain ..."
            )
        return instance

    def find_siblings(self, instance: StageInstance) -> list[StageInstance]:
        """Returns the finished instances of all stages that use the encoder of `instance`, for all seeds."""
        found = []
        for name in self.recipe.stages:
            if self.recipe.encoder_source(name) is None:
                continue
            # A stage may lack its encoder, or the command may not have downloaded it.
            with contextlib.suppress(UserError, KeyError):
                instances = [self.find_instance(name, seed) for seed in self.recipe.seeds]
                if any((one.seed, one.encoder) == (instance.seed, instance.encoder) for one in instances):
                    found += [one for one in instances if one.result is not None]
        return found

    def find_begun(self, name: str) -> Sequence[StageInstance]:
        """Returns the instances of a stage that have a folder."""
        found = []
        for seed in self.recipe.seeds:
            with contextlib.suppress(UserError, KeyError):
                found.append(self.find_instance(name, seed))
        return [instance for instance in found if instance.folder.exists()]


def _hash_manifest(folder: Path) -> str:
    return hash_json(json.loads((folder / "manifest.json").read_text("utf-8")))
