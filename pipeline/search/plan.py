"""A checked search, and the recipe of each of its trials."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from firstlight.pipeline import ROOT
from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.conf_files import find_conf_file
from firstlight.pipeline.config.load import RecipeFiles, hash_json, parse_recipe, split_override
from firstlight.pipeline.config.messages import explain_errors
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.scale import ORDER_KEYS, ScaleOptions
from firstlight.pipeline.config.stages import TrainingLength, TrainingOptions
from firstlight.pipeline.errors import UserError, suggest_valid
from firstlight.pipeline.run.given_weights import WEIGHTS_KEY
from firstlight.pipeline.search.objectives import parse_measure
from firstlight.pipeline.search.space import Pbt, Search, Values
from firstlight.pipeline.stages.registry import stage_kind

RECIPE_FOLDER = ROOT / "conf" / "recipe"
# Keys of a search that do not change its trials. A larger number of trials only adds some, except in a population.
NOT_IN_FINGERPRINT = {"name", "description", "concurrency", "promote", "retrain", "recipe"}


@dataclass(frozen=True)
class SearchPlan:
    """A search and the recipe that its trials vary.

    The files of the recipe are read once, when the plan is loaded: if somebody edits them during the search, its later
    trials are not affected.
    """

    search: Search
    files: RecipeFiles
    # Overrides `key=value` of the recipe, from the command line.
    overrides: tuple[str, ...]

    def at_scale(self, scale: ScaleOptions) -> "SearchPlan":
        """Returns the plan for the workers, GPUs and object store of `scale`, where the recipe leaves them to the
        machines.
        """
        workers = list(scale.workers) if isinstance(scale.workers, tuple) else scale.workers
        chosen = (
            f"scale.workers={json.dumps(workers)}",
            f"scale.gpus_per_worker={scale.gpus_per_worker}",
            f"scale.object_store_mb={scale.object_store_mb}",
        )
        return replace(self, overrides=(*self.overrides, *chosen))

    def full_recipe(self, values: Mapping[str, Any]) -> Recipe:
        """Returns the recipe with these values and without the budget of a trial.

        Raises:
            UserError: as `load_recipe`.
        """
        return self.files.build_recipe(self.overrides, values=values)

    def budget_recipe(self, values: Mapping[str, Any] | None = None) -> Recipe:
        """Returns the recipe with the budget of a trial (`overrides` of the search), and with these values.

        Without values, it has those of the first corner if it is no recipe without them: if the search replaces
        `epochs` by null, for example, and searches `steps`.

        Raises:
            UserError: as `load_recipe`.
        """
        budget = self.search.overrides
        try:
            return self.files.build_recipe(self.overrides, values={**budget, **(values or {})})
        except UserError as error:
            if values is not None:
                raise
            try:
                return self.files.build_recipe(self.overrides, values={**budget, **self.corner_values()[0]})
            except UserError:
                raise error from None

    def trial_recipe(self, values: Mapping[str, Any], references: Mapping[str, str] | None = None) -> Recipe:
        """Returns the recipe of a trial: only the stages that decide its objectives, scored on held-out images only.

        Trials share the CPUs, so that `scale.threads: auto` is no more for them than the threads of a worker.

        `references`: references to encoders that replace those of the recipe, by stage, or `encoder.weights`.

        Raises:
            UserError: as `load_recipe`.
        """
        recipe = self.budget_recipe(values)
        raw = recipe.dump()
        for name, reference in (references or {}).items():
            if name == WEIGHTS_KEY:
                raw["encoder"]["weights"] = reference
            else:
                raw["stages"][name]["encoder"] = reference
        raw["scale"]["threads"] = recipe.scale.worker_threads
        stages = {name: raw["stages"][name] for name in self.trial_stages(recipe)}
        for stage in stages.values():
            # A trial must not replace a model that a run of the recipe has registered.
            if "register_as" in stage:
                stage["register_as"] = None
        return parse_recipe({**raw, "stages": stages, "score_test": False, "expected": [], "needs": None})

    def trial_stages(self, recipe: Recipe) -> list[str]:
        """Returns the stages that a trial runs, in the order of the recipe.

        These are the stages that the objectives and the scheduler read, and the stages whose encoder those start from.
        """
        measures = [objective.measure for objective in self.search.objectives]
        if self.search.scheduler_objective:
            measures.append(self.search.scheduler_objective[0])
        used = {parse_measure(measure).stage for measure in measures}
        # Stages start from earlier ones.
        for name in reversed(recipe.stages):
            source = recipe.encoder_source(name) if name in used else None
            used |= {source.stage} if source and source.stage else set()
        return [name for name in recipe.stages if name in used]

    def encoder_stage(self, recipe: Recipe) -> str | None:
        """Returns the stage that makes the encoder which the first objective scores, None if it is of another run."""
        scored = parse_measure(self.search.objectives[0].measure).stage
        if recipe.stages[scored].makes_encoder:
            return scored
        source = recipe.encoder_source(scored)
        return source.stage if source else None

    def corner_values(self) -> list[Values]:
        """Returns one point of the space, and for each dimension the points that have one of its end values instead.

        A value that the recipe refuses is nearly always an end of a range or a listed value, so these points find it.
        """
        start = {key: dimension.end_values[0] for key, dimension in self.search.space.items()}
        ends = [{**start, key: end} for key, dimension in self.search.space.items() for end in dimension.end_values]
        return list({json.dumps(values, sort_keys=True): values for values in [start, *ends]}.values())

    @cached_property
    def max_length(self) -> TrainingLength:
        """The maximum length, over the corners, of the training that the scheduler monitors.

        It is one epoch without a scheduler.

        Raises:
            UserError: the length is in epochs at some corners and in steps at others.
        """
        if self.search.scheduler_objective is None:
            return TrainingLength(1, "epochs")
        name = parse_measure(self.search.scheduler_objective[0]).stage
        lengths = list[TrainingLength]()
        for values in self.corner_values():
            stage = self.trial_recipe(values).stages[name]
            assert isinstance(stage, TrainingOptions), "a scheduler decides by what a training logs"
            lengths.append(stage.length)
        if len({length.unit for length in lengths}) > 1:
            raise UserError(
                f"space: some trials have stages.{name}.epochs and others stages.{name}.steps, which "
                f"scheduler: {self.search.scheduler.name} cannot compare; valid: one of the two for all trials"
            )
        return max(lengths, key=lambda length: length.count)

    def list_warnings(self) -> list[str]:
        """Returns the sentences about settings that are known to fail which hold for every corner of the space."""
        recipes = [self.trial_recipe(values) for values in self.corner_values()]
        found = [
            [line for name, stage in recipe.stages.items() for line in stage_kind(stage).list_warnings(name, stage)]
            for recipe in recipes
        ]
        return [line for line in found[0] if all(line in lines for lines in found)]

    def explain_error(self, message: str, values: Mapping[str, Any]) -> str:
        """Rewrites the error of a recipe with these values so that it names the key of the space."""
        given = ", ".join(f"{key}: {json.dumps(value)}" for key, value in values.items())
        return "\n".join(
            f"space.{line}" if self._is_searched(line.partition(":")[0]) else f"space: with {given}: {line}"
            for line in message.splitlines()
        )

    def _is_searched(self, named: str) -> bool:
        """Returns True if a key is searched, lies inside a searched section, or contains a searched key."""
        return any(f"{key}.".startswith(f"{named}.") or f"{named}.".startswith(f"{key}.") for key in self.search.space)

    def fingerprint(self) -> str:
        """Returns 12 hexadecimal digits that are equal for two searches only if their trials are the same."""
        excluded = NOT_IN_FINGERPRINT | (set() if isinstance(self.search.scheduler, Pbt) else {"trials"})
        search = self.search.model_dump(mode="json", exclude=excluded)
        recipe = self.budget_recipe().model_dump(
            mode="json", exclude={"name", "description", "storage", "tracking", "scale", "expected", "needs"}
        )
        recipe["dataset"] = {
            key: value for key, value in recipe["dataset"].items() if key not in ("root", "download", "extends")
        }
        recipe["stream"] = {key: recipe["stream"][key] for key in ORDER_KEYS}
        return hash_json({"search": search, "recipe": recipe})[:12]


def load_plan(path: Path, overrides: tuple[str, ...] = ()) -> SearchPlan:
    """Reads a search file and its recipe. `checks.load_checked_plan` also checks one against the other.

    `path`: the file of a search, or the name of a shipped one, for example `nat`. `overrides`: texts `key=value`.
    Overrides whose key begins with a field of the search set the search, the others the recipe.

    Raises:
        UserError: one line for each mistake, which names the dotted key, the value and the valid values.
    """
    path = find_conf_file(path, "search")
    raw = yaml_reader.read_yaml(path)
    if "stages" in raw:
        raise UserError(f"{path}: is a recipe, not a search of settings: firstlight run {path}")
    own = [override for override in overrides if override.partition("=")[0].split(".")[0] in Search.model_fields]
    for keys, value in map(split_override, own):
        raw = _apply_override(raw, keys, value)
    try:
        search = Search.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise UserError(explain_errors(error, raw, Search)) from None
    others = tuple(override for override in overrides if override not in own)
    return SearchPlan(search, RecipeFiles(_find_recipe_file(path, search.recipe)), others)


def _apply_override(raw: Any, keys: list[str], value: Any) -> dict[str, Any]:
    """Returns the search with one key replaced.

    The parts after the first are one key of that section: the keys of `space` and `overrides` contain dots.
    """
    section = raw.get(keys[0])
    section = {"name": section} if keys[0] == "scheduler" and isinstance(section, str) else section
    if len(keys) > 1:
        value = {**(section if isinstance(section, dict) else {}), ".".join(keys[1:]): value}
    return {**raw, keys[0]: value}


def _find_recipe_file(path: Path, name: str) -> Path:
    """Returns the recipe that a search names: in the `conf` that the search is in, next to the search, or in ours.

    Raises:
        UserError: no such file.
    """
    own_conf = [parent / "recipe" / name for parent in path.resolve().parents if parent.name == "conf"]
    # A search in a `conf` has other searches beside it. Elsewhere, a recipe beside it hides a shipped one of its name.
    for file in (*own_conf, path.resolve().parent / name, RECIPE_FOLDER / name):
        if file.is_file():
            return file
    known = {file.relative_to(RECIPE_FOLDER).as_posix() for file in RECIPE_FOLDER.rglob("*.yaml")}
    raise UserError(
        f"recipe: {name!r} is neither in the folder of {path} nor in conf/recipe; {suggest_valid(name, known)}"
    )
