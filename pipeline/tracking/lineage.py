"""The runs of an experiment in MLflow and their lineage: store -> pretraining -> models -> stages that use them."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from firstlight.pipeline.errors import UserError, suggest_valid
from firstlight.pipeline.tracking.client import ENCODER_RUN_TAG, ENCODER_TAG, MADE_TAG, STAGE_RUNS_PREFIX
from firstlight.pipeline.tracking.connection import connect_client
from firstlight.pipeline.tracking.location import TrackingLocation
from firstlight.pipeline.tracking.retry import RetryingClient, describe_failure, short_timeouts

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Kinds of runs that consist of other runs.
COMPOSITE_KINDS = ("recipe", "search", "trial", "retrain")
# The networks that runs of earlier versions made, whose tags do not say it, by the kind of the stage.
MADE_BY_KIND = {"pretrain": "encoder", "finetune": "model"}
SHORT_ID_LENGTH = 8
RUNS_PER_PAGE = 1000
MAX_MATCHES_LISTED = 5


@dataclass(frozen=True)
class Run:
    """One run of MLflow.

    `kind` is one of `COMPOSITE_KINDS`, prepare, or the kind of a stage. `start` and `end` are in seconds since 1970.
    `store` is the sha256 of the store that the run reads or wrote, "" if it is unknown. `model` is the id of the logged
    model that is its output.
    """

    id: str
    name: str
    kind: str
    status: str
    start: float
    end: float | None
    parent: str | None
    store: str
    model: str | None
    tags: dict[str, str] = field(repr=False)
    params: dict[str, str] = field(repr=False)
    metrics: dict[str, float] = field(repr=False)
    artifact_uri: str = ""

    @property
    def short_id(self) -> str:
        return self.id[:SHORT_ID_LENGTH]

    @property
    def stage(self) -> str:
        """Returns the name of the stage in its recipe."""
        return self.tags.get("firstlight.stage", self.name)

    @property
    def encoder(self) -> str | None:
        """Returns the pinned reference of the encoder that the run started from, None if there is none."""
        return self.tags.get(ENCODER_TAG)

    @property
    def artifact(self) -> str:
        """Returns the folder of the network that the run makes: `encoder`, `model` (a fine-tuned one, which contains
        its encoder), or "" if it makes none.
        """
        return self.tags.get(MADE_TAG) or MADE_BY_KIND.get(self.kind, "")

    @property
    def is_composite(self) -> bool:
        """Returns True for a run that consists of other runs, such as a recipe or a search."""
        return self.kind in COMPOSITE_KINDS


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model, and the aliases that refer to it."""

    name: str
    version: str
    run: str
    aliases: tuple[str, ...]

    @property
    def reference(self) -> str:
        """Returns the reference for recipes, with an alias if the version has one."""
        return f"models:/{self.name}@{self.aliases[0]}" if self.aliases else f"models:/{self.name}/{self.version}"


@dataclass(frozen=True)
class Lineage:
    """The runs of an experiment, and the relations between them."""

    location: TrackingLocation
    experiment_id: str
    runs: dict[str, Run]
    versions: tuple[ModelVersion, ...]

    @cached_property
    def _children_by_parent(self) -> dict[str, list[Run]]:
        below: dict[str, list[Run]] = {}
        for run in sorted(self.runs.values(), key=lambda run: run.start):
            if run.parent:
                below.setdefault(run.parent, []).append(run)
        return below

    def list_children(self, run: Run) -> list[Run]:
        """Returns the child runs of a run in MLflow, oldest first."""
        return self._children_by_parent.get(run.id, [])

    def list_stages(self, recipe: Run) -> list[Run]:
        """Returns the runs of a recipe's stages, prepare first, with those that an earlier run of the recipe made."""
        found = {run.id: run for run in self.list_children(recipe) if not run.is_composite}
        noted = [
            run_id for key, ids in recipe.tags.items() if key.startswith(STAGE_RUNS_PREFIX) for run_id in ids.split()
        ]
        found |= {run_id: self.runs[run_id] for run_id in noted if run_id in self.runs}
        prepared = self.find_prepare_run(recipe.store)
        if prepared and not any(run.kind == "prepare" for run in found.values()):
            found[prepared.id] = prepared
        return sorted(found.values(), key=lambda run: (run.kind != "prepare", run.start))

    def list_trials(self, search: Run) -> list[Run]:
        """Returns the runs of the trials of a search, oldest first."""
        return [run for run in self.list_children(search) if run.is_composite]

    def list_roots(self) -> list[Run]:
        """Returns the recipes and searches that have no parent, newest first."""
        tops = [run for run in self.runs.values() if run.is_composite and run.parent not in self.runs]
        return sorted(tops, key=lambda run: run.start, reverse=True)

    def find_recipe(self, run: Run) -> Run | None:
        """Returns the run of the recipe that a stage's run belongs to, None if there is none."""
        return self.runs.get(run.parent or "")

    def find_prepare_run(self, store: str) -> Run | None:
        """Returns the first run that wrote a store or found it written, None if there is none."""
        found = [run for run in self.runs.values() if run.kind == "prepare" and store and run.store == store]
        return min(found, key=lambda run: run.start, default=None)

    def find_source_id(self, run: Run) -> str | None:
        """Returns the id of the run that made the encoder of `run`, None if it has none. That run may be deleted."""
        return run.tags.get(ENCODER_RUN_TAG) or (self._find_maker(run.encoder) if run.encoder else None)

    def _find_maker(self, reference: str) -> str | None:
        kind, _, path = reference.partition(":/")
        name, _, version = path.partition("/")
        if kind == "runs":
            return name
        return next((v.run for v in self.versions if (v.name, v.version) == (name, version)), None)

    def find_source(self, run: Run) -> Run | None:
        """Returns the run that made the encoder that `run` started from, None if it is not known."""
        return self.runs.get(self.find_source_id(run) or "")

    def list_consumers(self, run: Run) -> list[Run]:
        """Returns the runs of the stages that started from the encoder of `run`, oldest first."""
        found = [other for other in self.runs.values() if self.find_source_id(other) == run.id]
        return sorted(found, key=lambda other: other.start)

    def list_models(self, run: Run) -> list[ModelVersion]:
        """Returns the registered versions of the encoder of a run."""
        return [version for version in self.versions if version.run == run.id]

    def encoder_reference(self, run: Run, short: bool = True) -> str:
        """Returns the reference for recipes of the encoder of a run, "" if it made none. `short` shortens its id."""
        if run.model is None:
            return ""
        with_alias = sorted(self.list_models(run), key=lambda version: not version.aliases)
        return (
            with_alias[0].reference
            if with_alias
            else f"runs:/{run.short_id if short else run.id}/{run.artifact or 'encoder'}"
        )

    def find_run(self, text: str) -> Run:
        """Returns the run that `text` identifies.

        `text` is the beginning of an id, `runs:/...`, `models:/...`, or the name of a recipe or search, whose newest
        run is meant.

        Raises:
            UserError: no run matches, or several do; names them.
        """
        if text.startswith("models:/"):
            return self._find_by_model(text)
        beginning = text.removeprefix("runs:/").partition("/")[0]
        found = [run for run in self.runs.values() if run.id.startswith(beginning)] if beginning else []
        if len(found) == 1:
            return found[0]
        if found:
            listing = ", ".join(f"{run.id} ({run.name})" for run in found[:MAX_MATCHES_LISTED])
            raise UserError(f"run: {text!r} is the beginning of several ids: {listing}")
        named = [run for run in self.runs.values() if run.is_composite and run.name == text]
        if named:
            return max(named, key=lambda run: run.start)
        names = {run.name for run in self.runs.values() if run.is_composite}
        missing = f"is neither the beginning of an id nor the name of a recipe in {self.location.uri}"
        raise UserError(f"run: {text!r} {missing}; {suggest_valid(text, names)}")

    def _find_by_model(self, text: str) -> Run:
        for version in self.versions:
            if text in (
                f"models:/{version.name}/{version.version}",
                *(f"models:/{version.name}@{alias}" for alias in version.aliases),
            ):
                if version.run in self.runs:
                    return self.runs[version.run]
                raise UserError(f"run: {text!r} was made by run {version.run}, which is not in {self.location.uri}")
        by_model = [run for run in self.runs.values() if text == f"models:/{run.model}"]
        if by_model:
            return by_model[0]
        known = [version.reference for version in self.versions]
        valid = suggest_valid(text, known) if known else "no model is registered there"
        raise UserError(f"run: {text!r} is not in {self.location.uri}; {valid}")


def read_lineage(location: TrackingLocation) -> tuple[Lineage, "MlflowClient"]:
    """Returns the lineage of all runs at a location, and the client that has read it.

    Raises:
        UserError: nothing was run there, or the server or database cannot be read.
    """
    where = f"tracking.uri: {location.uri!r}"
    if location.database and not location.database.exists():
        found = f"nothing was run in storage {str(location.storage)!r}"
        raise UserError(f"{where} does not exist: {found}; valid: storage=<folder of earlier runs>, or a recipe")
    try:
        client = cast("MlflowClient", RetryingClient(connect_client(location.uri)))
        with short_timeouts():
            experiment = client.get_experiment_by_name(location.experiment)
        if experiment is None:
            raise UserError(
                f"tracking.experiment: {location.experiment!r} is not in {location.uri}: nothing was run there"
            )
        runs = {run.id: run for run in map(_to_run, _iterate_pages(client.search_runs, [experiment.experiment_id]))}
        versions = tuple(_read_versions(client))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where} cannot be read: {describe_failure(error)}") from None
    return Lineage(location, str(experiment.experiment_id), runs, versions), client


def _iterate_pages(search: Any, *arguments: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(*arguments, max_results=RUNS_PER_PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _to_run(found: Any) -> Run:
    info, data = found.info, found.data
    kind = find_run_kind(data.tags)
    # A recipe's run shows the models of its stages.
    outputs = (found.outputs.model_outputs if found.outputs and kind not in COMPOSITE_KINDS else None) or ()
    model = next((output.model_id for output in outputs), None)
    end = None if info.end_time is None else info.end_time / 1000
    given = (found.inputs.dataset_inputs if found.inputs else None) or ()
    store = find_store_hash(kind, data.params, (one.dataset.source for one in given))
    return Run(
        info.run_id, info.run_name, kind, info.status, info.start_time / 1000, end, data.tags.get("mlflow.parentRunId"),
        store, model, dict(data.tags), dict(data.params), dict(data.metrics), info.artifact_uri,
    )  # fmt: skip


def find_run_kind(tags: Mapping[str, str]) -> str:
    """Returns the kind of a run with these tags, "other" if Firstlight has not made it."""
    return tags.get("firstlight.kind", "recipe" if "firstlight.recipe" in tags else "other")


def find_store_hash(kind: str, params: Mapping[str, str], sources: Iterable[str]) -> str:
    """Returns the sha256 of the store of a run, "" if it is not known. `sources`: those of its data sets, as JSON."""
    logged = params.get("hash") if kind == "prepare" else params.get("store")
    if logged:
        return str(logged)
    for source in sources:
        # Another program may have logged it.
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            return str(json.loads(source)["sha256"])
    return ""


def _read_versions(client: "MlflowClient") -> Iterator[ModelVersion]:
    aliases: dict[tuple[str, str], list[str]] = {}
    for model in _iterate_pages(client.search_registered_models):
        for alias, version in model.aliases.items():
            aliases.setdefault((model.name, str(version)), []).append(alias)
    for found in _iterate_pages(client.search_model_versions):
        yield ModelVersion(
            found.name,
            str(found.version),
            found.run_id,
            tuple(sorted(aliases.get((found.name, str(found.version)), ()))),
        )


def collect_ids(runs: Sequence[Run]) -> set[str]:
    """Returns the ids of runs."""
    return {run.id for run in runs}
