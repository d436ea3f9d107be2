"""The stage graph of a recipe: the encoder that each stage starts from, and the folder of each stage and seed.

A folder is named by a hash of all that decides the result of the stage.
"""

import contextlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firstlight.pipeline.config.load import hash_json, parse_recipe
from firstlight.pipeline.config.recipe import EncoderSource, Recipe
from firstlight.pipeline.config.scale import ORDER_KEYS
from firstlight.pipeline.config.stages import PREVIOUS, StageConfig
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.given_weights import GivenWeights
from firstlight.pipeline.stages.artifacts.companions import TEACHER, load_companion
from firstlight.pipeline.stages.artifacts.encoder_description import (
    check_encoder_spec,
    check_whole_encoder,
    read_encoder_spec,
)
from firstlight.pipeline.stages.code_version import code_version
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.stages.stage import StageInstance, TrainingSegment
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.tracking.location import TrackingLocation
from firstlight.pipeline.tracking.references import fetch_reference, find_companion, pin_reference
from firstlight.tasks.extensions.registry import hash_extensions

# The key of a stage that asks for a network besides the encoder.
COMPANION_KEYS = {"head": "features", "decoder": "arms", "bank": "knn_bank"}


@dataclass
class ResolvedReferences:
    """The downloaded encoders and other networks that a recipe takes from MLflow, by the name of the stage."""

    # The pinned reference of the encoder, and the folder that it was downloaded to.
    encoders: dict[str, tuple[str, Path]] = field(default_factory=dict)
    # The folders of what belongs to that encoder and the stage needs: a head, a decoder, a memory bank.
    companions: dict[str, dict[str, Path]] = field(default_factory=dict)
    # The encoder with the weights that `encoder.weights` names, if a stage uses them.
    given: GivenWeights | None = None
    # The frozen networks that pretrainings learn from, by stage.
    teachers: dict[str, GivenWeights] = field(default_factory=dict)


def adopt_encoder(recipe: Recipe, origin: TrackingLocation | None, only: str | None) -> tuple[Recipe, str]:
    """Returns the recipe with the keys of `encoder` that it leaves out filled in, and a line about them, or "".

    They are those of the first encoder that a stage takes from MLflow, if every stage takes one from there: otherwise
    the section is that of a network that is trained. `resolve_references` checks what the recipe states itself.

    Args:
        origin: where the encoders are kept; None: where the recipe keeps its runs.
        only: the kind of the stages that will run; None for all.

    Raises:
        UserError: the encoder does not exist or is damaged.
    """
    stated, section = set[str](), {}
    if recipe.encoder is not None:
        stated, section = recipe.encoder.model_fields_set, recipe.network_spec
    names = [name for name, stage in recipe.stages.items() if recipe.encoder is None or only in (None, stage.kind)]
    if not recipe.takes_all_encoders or not names or (section and stated >= section.keys()):
        return recipe, ""
    tracking, where = TrackingClient(recipe, origin), f"stages.{names[0]}.encoder"
    source = recipe.encoder_source(names[0])
    assert source is not None
    assert source.reference is not None
    reference = pin_reference(tracking, source.reference, where)
    with tempfile.TemporaryDirectory() as folder:
        spec = read_encoder_spec(fetch_reference(tracking, reference, Path(folder), where))
    taken = {key: value for key, value in spec.items() if key not in stated and (key, value) not in section.items()}
    if not taken or ("name" in stated and section["name"] != spec["name"]):
        return recipe, ""
    listed = ", ".join(f"{key} {json.dumps(value)}" for key, value in taken.items())
    raw = recipe.dump()
    filled = parse_recipe({**raw, "encoder": {**(raw["encoder"] or {}), **taken}})
    return filled, f"encoder, as {reference} has it, which {where} names: {listed}"


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
        check_encoder_spec(folder, recipe.network_spec, where)
        if source.artifact == "encoder":
            check_whole_encoder(folder, f"{where}: {source.reference!r}")
        stage_kind(stage).check_reference(name, stage, recipe, folder)
        found.encoders[name] = (reference, folder)
        found.companions[name] = {
            wanted: _fetch_companion(
                f"stages.{name}.{_find_companion_key(stage, wanted)}", reference, wanted, tracking, inputs
            )
            for wanted in stage.companions
        }
        stage_kind(stage).check_companions(name, stage, recipe, found.companions[name])
    return found


def _find_companion_key(stage: StageConfig, wanted: str) -> str:
    """Returns the key of a stage that asks for `wanted`; `encoder` if a stage of its kind always needs it."""
    key = COMPANION_KEYS[wanted]
    return key if key in type(stage).model_fields else "encoder"


def _fetch_companion(key: str, reference: str, wanted: str, tracking: TrackingClient, inputs: Path) -> Path:
    """Downloads what a stage needs besides the referenced encoder, because of its key `key`. Returns its folder."""
    other = find_companion(tracking, reference, wanted, key)
    return fetch_reference(tracking, other, inputs / hash_json(other)[:12], key)


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
            UserError: the encoder that it starts from is missing or damaged, or its result is.
        """
        recipe, stage = self.recipe, self.recipe.stages[name]
        settings = stage.model_dump(mode="json")
        teacher = self.references.teachers.get(name)
        if teacher is not None:
            # Its saved network decides, wherever its weights lie.
            settings["method"]["teacher"] = _hash_manifest(teacher.folder)
        decides: dict[str, Any] = {
            "stage": {key: value for key, value in settings.items() if key not in stage.keys_without_effect},
            "dataset": recipe.dataset.model_dump(mode="json", exclude={"root", "download", "extends"}),
            "encoder": recipe.network_spec,
            "order": recipe.stream.model_dump(include=set(ORDER_KEYS)),
            "seed": seed,
            "store": self.store,
            "code": code_version(type(stage_kind(stage))),
            "score_test": recipe.score_test,
            **({"extensions": extensions} if (extensions := hash_extensions()) else {}),
            **_list_measured_splits(recipe),
            **stage_kind(stage).list_deciding_facts(stage, recipe),
        }
        source = recipe.encoder_source(name)
        encoder, companions = None, {} if teacher is None else {TEACHER: teacher.folder}
        if source is not None:
            encoder = self._find_encoder(name, source, seed)
            decides["from"] = _hash_manifest(encoder)
            for wanted in stage.companions:
                companions[wanted] = self._find_companion(name, source, wanted, seed)
                decides[wanted] = _hash_manifest(companions[wanted])
        given = self.references.given.folder if stage.takes_given and self.references.given else None
        if given is not None:
            decides["given"] = _hash_manifest(given)
        segment = self.segment if self.segment and self.segment.stage == name else TrainingSegment(name)
        if segment.before:
            decides["before"] = segment.before
        fingerprint = hash_json(decides)[:12]
        folder = self.folder / f"{name}-seed{seed}-{fingerprint}"
        place = name, seed, fingerprint, folder, encoder, companions
        instance = StageInstance(*place, segment.begin, segment.until, given, decides)
        stage_kind(stage).check_result(stage, instance)
        return instance

    def _find_encoder(self, name: str, source: EncoderSource, seed: int) -> Path:
        """Returns the folder of the encoder that a stage starts from, its files checked."""
        if source.is_given:
            assert self.references.given is not None
            return self.references.given.folder
        if source.stage is None:
            return self.references.encoders[name][1]
        upstream = self.find_upstream(name, seed)
        folder = upstream.folder / source.artifact
        try:
            spec = self.recipe.network_spec
            check_encoder_spec(folder, spec, f"stages.{name}.encoder")
        except UserError as error:
            raise UserError(
                f"{error}; delete {upstream.folder} and run again: {upstream.label} is trained again from its seed"
            ) from None
        return folder

    def _find_companion(self, name: str, source: EncoderSource, wanted: str, seed: int) -> Path:
        """Returns the folder of what a stage needs besides its encoder, its files checked."""
        if source.stage is None:
            folder = self.references.companions[name][wanted]
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
                f"firstlight {self.recipe.stages[source.stage].kind} ..."
            )
        return instance

    def find_siblings(self, instance: StageInstance) -> list[StageInstance]:
        """Returns the finished instances of all stages that use the encoder of `instance`, for all seeds."""
        found = []
        for name in self.recipe.stages:
            if self.recipe.encoder_source(name) is None and not self.recipe.stages[name].takes_given:
                continue
            # A stage may lack its encoder, or the command may not have downloaded it.
            with contextlib.suppress(UserError, KeyError):
                instances = [self.find_instance(name, seed) for seed in self.recipe.seeds]
                if any(one.seed == instance.seed and instance.encoder in (one.encoder, one.given) for one in instances):
                    found += [one for one in instances if one.result is not None]
        return found

    def find_begun(self, name: str) -> Sequence[StageInstance]:
        """Returns the instances of a stage that have a folder."""
        found = []
        for seed in self.recipe.seeds:
            with contextlib.suppress(UserError, KeyError):
                found.append(self.find_instance(name, seed))
        return [instance for instance in found if instance.folder.exists()]


def _list_measured_splits(recipe: Recipe) -> dict[str, list[str]]:
    """Returns what decides the training images besides the section `dataset`, where a fraction is null there."""
    if None not in (recipe.dataset.test_fraction, recipe.dataset.val_fraction):
        return {}
    return {"measured": sorted(recipe.measured_splits)}


def _hash_manifest(folder: Path) -> str:
    return hash_json(json.loads((folder / "manifest.json").read_text("utf-8")))
