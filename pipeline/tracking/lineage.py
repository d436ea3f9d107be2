"""What MLflow knows of runs and what they were made from: store -> pretraining -> models -> the stages that took them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from firstlight.pipeline.errors import UserError, suggest_valid
from firstlight.pipeline.tracking.client import ENCODER, ENCODER_RUN, STAGE_RUNS
from firstlight.pipeline.tracking.location import Records
from firstlight.pipeline.tracking.retry import hasty, reason

if TYPE_CHECKING:
    from mlflow import MlflowClient

WHOLE = ("recipe", "search", "trial", "retrain")  # kinds of runs that are made of others
SHOWN = 8  # characters of a run's id that are shown
PAGE = 1000


@dataclass(frozen=True)
class Run:
    """One run of MLflow. `kind`: one of `WHOLE`, prepare, or that of a stage; times in seconds since 1970."""

    id: str
    name: str
    kind: str
    status: str
    start: float
    end: float | None
    parent: str | None
    store: str  # sha256 of the store it reads, or wrote; "": unknown
    model: str | None  # the id of the logged model that it put out
    tags: dict[str, str] = field(repr=False)
    params: dict[str, str] = field(repr=False)
    metrics: dict[str, float] = field(repr=False)
    artifacts: str = ""  # where its artifacts are

    @property
    def short(self) -> str:
        return self.id[:SHOWN]

    @property
    def stage(self) -> str:
        """The name of the stage in its recipe."""
        return self.tags.get("firstlight.stage", self.name)

    @property
    def encoder(self) -> str | None:
        """The pinned reference of the encoder that it started from."""
        return self.tags.get(ENCODER)

    @property
    def whole(self) -> bool:
        """A recipe or a search, made of other runs."""
        return self.kind in WHOLE


@dataclass(frozen=True)
class Version:
    """A version of a registered model, and the aliases that lead to it."""

    name: str
    version: str
    run: str
    aliases: tuple[str, ...]

    @property
    def reference(self) -> str:
        """As a recipe takes it; by an alias where it has one."""
        return f"models:/{self.name}@{self.aliases[0]}" if self.aliases else f"models:/{self.name}/{self.version}"


@dataclass(frozen=True)
class Lineage:
    """All runs of an experiment, and how they hang together."""

    records: Records
    experiment: str
    runs: dict[str, Run]
    versions: tuple[Version, ...]

    @cached_property
    def _below(self) -> dict[str, list[Run]]:
        below: dict[str, list[Run]] = {}
        for run in sorted(self.runs.values(), key=lambda run: run.start):
            if run.parent:
                below.setdefault(run.parent, []).append(run)
        return below

    def children(self, run: Run) -> list[Run]:
        """The runs below it in MLflow, oldest first."""
        return self._below.get(run.id, [])

    def stages(self, recipe: Run) -> list[Run]:
        """The runs of a recipe's stages, prepare first; also those that an earlier run of the recipe has made."""
        mine = {run.id: run for run in self.children(recipe) if not run.whole}
        told = [run_id for key, ids in recipe.tags.items() if key.startswith(STAGE_RUNS) for run_id in ids.split()]
        mine |= {run_id: self.runs[run_id] for run_id in told if run_id in self.runs}
        prepared = self.prepared(recipe.store)
        if prepared and not any(run.kind == "prepare" for run in mine.values()):
            mine[prepared.id] = prepared
        return sorted(mine.values(), key=lambda run: (run.kind != "prepare", run.start))

    def trials(self, search: Run) -> list[Run]:
        return [run for run in self.children(search) if run.whole]

    def tops(self) -> list[Run]:
        """Recipes and searches that are below nothing, newest first."""
        tops = [run for run in self.runs.values() if run.whole and run.parent not in self.runs]
        return sorted(tops, key=lambda run: run.start, reverse=True)

    def recipe(self, run: Run) -> Run | None:
        """The recipe that a stage's run belongs to."""
        return self.runs.get(run.parent or "")

    def prepared(self, store: str) -> Run | None:
        """The first run that wrote a store, or found it written."""
        mine = [run for run in self.runs.values() if run.kind == "prepare" and store and run.store == store]
        return min(mine, key=lambda run: run.start, default=None)

    def source_id(self, run: Run) -> str | None:
        """The id of the run that made the encoder that `run` started from; that run may be deleted."""
        return run.tags.get(ENCODER_RUN) or (self._made(run.encoder) if run.encoder else None)

    def _made(self, reference: str) -> str | None:
        kind, _, path = reference.partition(":/")
        name, _, version = path.partition("/")
        if kind == "runs":
            return name
        return next((v.run for v in self.versions if (v.name, v.version) == (name, version)), None)

    def source(self, run: Run) -> Run | None:
        return self.runs.get(self.source_id(run) or "")

    def consumers(self, run: Run) -> list[Run]:
        """The stages that started from its encoder, oldest first."""
        found = [other for other in self.runs.values() if self.source_id(other) == run.id]
        return sorted(found, key=lambda other: other.start)

    def models(self, run: Run) -> list[Version]:
        return [version for version in self.versions if version.run == run.id]

    def reference(self, run: Run, short: bool = True) -> str:
        """What a recipe can take as `encoder`; "" where the run made none."""
        if run.model is None:
            return ""
        with_alias = sorted(self.models(run), key=lambda version: not version.aliases)
        return with_alias[0].reference if with_alias else f"runs:/{run.short if short else run.id}/encoder"

    def find(self, text: str) -> Run:
        """The run that a word of the command line means: an id, its beginning, `models:/...`, `runs:/...`, or a recipe's name (its newest run).

        Raises:
            UserError: none or several are meant; names them.
        """
        if text.startswith("models:/"):
            return self._of_model(text)
        begun = text.removeprefix("runs:/").partition("/")[0]
        found = [run for run in self.runs.values() if run.id.startswith(begun)] if begun else []
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(
                f"run: {text!r} begins several ids: {', '.join(f'{run.id} ({run.name})' for run in found[:5])}"
            )
        named = [run for run in self.runs.values() if run.whole and run.name == text]
        if named:
            return max(named, key=lambda run: run.start)
        names = {run.name for run in self.runs.values() if run.whole}
        raise UserError(
            f"run: {text!r} is no id, no beginning of one and no recipe's name in {self.records.uri}; {suggest_valid(text, names)}"
        )

    def _of_model(self, text: str) -> Run:
        for version in self.versions:
            if text in (
                f"models:/{version.name}/{version.version}",
                *(f"models:/{version.name}@{alias}" for alias in version.aliases),
            ):
                if version.run in self.runs:
                    return self.runs[version.run]
                raise UserError(f"run: {text!r} was made by run {version.run}, which is not in {self.records.uri}")
        by_model = [run for run in self.runs.values() if text == f"models:/{run.model}"]
        if by_model:
            return by_model[0]
        known = [version.reference for version in self.versions]
        raise UserError(
            f"run: {text!r} is not in {self.records.uri}; {suggest_valid(text, known) if known else 'no model is registered there'}"
        )


def read(records: Records) -> tuple[Lineage, "MlflowClient"]:
    """All that MLflow has of the runs, and the client that has told it.

    Raises:
        UserError: nothing was run there; the server or database cannot be read.
    """
    import logging

    import mlflow

    logging.getLogger("alembic").setLevel(logging.ERROR)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    where = f"tracking.uri: {records.uri!r}"
    if records.database and not records.database.exists():
        raise UserError(
            f"{where} is not there: nothing was run in storage {str(records.storage)!r}; valid: storage=<folder of earlier runs>, a recipe"
        )
    try:
        mlflow.set_tracking_uri(records.uri)
        client = mlflow.MlflowClient(records.uri)
        with hasty():
            experiment = client.get_experiment_by_name(records.experiment)
        if experiment is None:
            raise UserError(
                f"tracking.experiment: {records.experiment!r} is not in {records.uri}: nothing was run there"
            )
        runs = {run.id: run for run in map(_run, _pages(client.search_runs, [experiment.experiment_id]))}
        versions = tuple(_versions(client))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where} cannot be read: {reason(error)}") from None
    return Lineage(records, str(experiment.experiment_id), runs, versions), client


def _pages(search: Any, *arguments: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(*arguments, max_results=PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _run(found: Any) -> Run:
    info, data = found.info, found.data
    kind = data.tags.get("firstlight.kind", "recipe" if "firstlight.recipe" in data.tags else "other")
    outputs = (found.outputs.model_outputs if found.outputs else None) or ()
    model = next((output.model_id for output in outputs), None)
    end = None if info.end_time is None else info.end_time / 1000
    return Run(
        info.run_id, info.run_name, kind, info.status, info.start_time / 1000, end, data.tags.get("mlflow.parentRunId"),
        _store_of(found), model, dict(data.tags), dict(data.params), dict(data.metrics), info.artifact_uri,
    )  # fmt: skip


def _store_of(found: Any) -> str:
    params = found.data.params
    told = params.get("hash") if found.data.tags.get("firstlight.kind") == "prepare" else params.get("store")
    if told:
        return str(told)
    for given in (found.inputs.dataset_inputs if found.inputs else None) or ():
        return str(json.loads(given.dataset.source)["sha256"])
    return ""


def _versions(client: "MlflowClient") -> Iterator[Version]:
    aliases: dict[tuple[str, str], list[str]] = {}
    for model in _pages(client.search_registered_models):
        for alias, version in model.aliases.items():
            aliases.setdefault((model.name, str(version)), []).append(alias)
    for found in _pages(client.search_model_versions):
        yield Version(
            found.name,
            str(found.version),
            found.run_id,
            tuple(sorted(aliases.get((found.name, str(found.version)), ()))),
        )


def ids(runs: Sequence[Run]) -> set[str]:
    return {run.id for run in runs}
