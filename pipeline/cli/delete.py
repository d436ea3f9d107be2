"""`firstlight delete`: a run with all that is below it, in MLflow and on disk."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import find_lock_owner
from firstlight.pipeline.tracking.client import RUN_FILE, STAGE_RUNS
from firstlight.pipeline.tracking.lineage import Lineage, Run, Version, ids

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Doomed:
    """What is deleted. `places`: the folders of stages, and the files that remember runs of recipes."""

    runs: tuple[Run, ...]
    versions: tuple[Version, ...]
    models: tuple[str, ...]  # ids of logged models
    places: tuple[Path, ...]
    bytes: int

    def lines(self) -> Iterator[str]:
        yield f"{_count(len(self.runs), 'run')}: " + ", ".join(f"{run.name} ({run.short})" for run in self.runs)
        if self.versions:
            told = (v.reference + (f" (version {v.version})" if v.aliases else "") for v in self.versions)
            yield f"{_count(len(self.versions), 'model version')}: {', '.join(told)}"
        if self.places:
            yield f"{_count(len(self.places), 'place')} on disk, {self.bytes / 1e6:,.1f} MB:"
            yield from (f"  {place}" for place in self.places)
        yield "and their artifacts in MLflow; stores of images stay"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def doomed(lineage: Lineage, client: "MlflowClient", run: Run) -> Doomed:
    """The run and all that is below it."""
    runs = list(_below(lineage, run))
    its = ids(runs)
    versions = tuple(version for version in lineage.versions if version.run in its)
    made = [one.id for one in runs if one.kind == "pretrain"]
    models = [
        m.model_id
        for run_id in made
        for m in client.search_logged_models([lineage.experiment], f"source_run_id = '{run_id}'")
    ]
    places = tuple(sorted(_on_disk(lineage.records.storage, its)))
    return Doomed(tuple(runs), versions, tuple(models), places, sum(map(_size, places)))


def _below(lineage: Lineage, run: Run) -> Iterator[Run]:
    yield run
    for child in lineage.children(run):
        yield from _below(lineage, child)


def _on_disk(storage: Path, its: set[str]) -> Iterator[Path]:
    """Folders that remember one of the runs, and the files by which a recipe remembers its own."""
    for folder, below, files in os.walk(storage):
        here = Path(folder)
        if here == storage:
            below[:] = [name for name in below if name not in ("stores", "mlartifacts")]
        if RUN_FILE in files and _remembers(here / RUN_FILE, its):
            below.clear()
            yield here
        elif here.name == "recipes":
            yield from (here / name for name in files if _remembers(here / name, its))
        elif RUN_FILE in files:
            below.clear()


def _remembers(file: Path, its: set[str]) -> bool:
    try:
        return json.loads(file.read_text("utf-8"))["run_id"] in its
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _size(place: Path) -> int:
    files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def check(lineage: Lineage, found: Doomed) -> list[str]:
    """Who else rests on it, as lines.

    Raises:
        UserError: something of it is being run.
    """
    its = ids(found.runs)
    for name in {recipe.name for run in found.runs if (recipe := run if run.whole else lineage.recipe(run))}:
        process = find_lock_owner(lineage.records.storage / name)
        if process:
            raise UserError(f"run: {name!r} is being run by process {process}; stop it, or wait for it")
    told = []
    for run in found.runs:
        for consumer in lineage.consumers(run):
            if consumer.id not in its:
                recipe = lineage.recipe(consumer)
                told.append(
                    f"{consumer.name} ({consumer.short}){f' of {recipe.name}' if recipe else ''} started from the encoder of {run.name}"
                )
    for other in lineage.runs.values():
        shared = {
            run_id for key, told_ids in other.tags.items() if key.startswith(STAGE_RUNS) for run_id in told_ids.split()
        } & its
        if other.id not in its and shared:
            names = ", ".join(run.name for run in found.runs if run.id in shared)
            if not _is_parent(lineage, other, found.runs, shared):
                told.append(f"the recipe {other.name} ({other.short}) is made of {names} too")
    return told


def _is_parent(lineage: Lineage, recipe: Run, runs: Sequence[Run], shared: set[str]) -> bool:
    """A recipe does not keep its own stages from being deleted: they would be run anew."""
    return all(run.parent == recipe.id for run in runs if run.id in shared)


def delete(lineage: Lineage, client: "MlflowClient", found: Doomed) -> None:
    """From disk first: where it is stopped half-way, MLflow still knows what is left to delete."""
    for place in found.places:
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
    for version in found.versions:
        client.delete_model_version(version.name, version.version)
        if not client.search_model_versions(f"name='{version.name}'"):
            client.delete_registered_model(version.name)
    for model in found.models:
        client.delete_logged_model(model)
    for run in reversed(found.runs):
        client.delete_run(run.id)
    if lineage.records.database:
        _collect(lineage.records.uri, found)
    else:
        _delete_artifacts(found)


def _collect(uri: str, found: Doomed) -> None:
    """MLflow's own collection of garbage: rows and files."""
    from mlflow.cli import gc

    arguments = ["--backend-store-uri", uri, "--tracking-uri", uri, "--run-ids", ",".join(run.id for run in found.runs)]
    arguments += ["--logged-model-ids", ",".join(found.models)] if found.models else []
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        gc.main(arguments, standalone_mode=False)


def _delete_artifacts(found: Doomed) -> None:
    """Behind a server the rows stay, marked as deleted, until its keeper runs `mlflow gc`."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    for run in found.runs:
        with contextlib.suppress(MlflowException, OSError):
            get_artifact_repository(run.artifacts).delete_artifacts()
