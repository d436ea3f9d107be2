"""`firstlight delete`: deletes a run and everything below it, in MLflow and on disk."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from firstlight.pipeline.data.mirror.mirror import CHECKPOINT_FOLDER
from firstlight.pipeline.data.mirror.places import explain_outage, find_mirror, name_location
from firstlight.pipeline.data.mirror.unit_records import STATE_FOLDER
from firstlight.pipeline.errors import StageFailed, UserError
from firstlight.pipeline.files import find_lock_owner
from firstlight.pipeline.records import DamagedRecord
from firstlight.pipeline.run.publishing import NOTES_FOLDER
from firstlight.pipeline.terminal import format_count
from firstlight.pipeline.tracking.client import STAGE_RUNS_PREFIX
from firstlight.pipeline.tracking.deletion import delete_records, find_logged_models
from firstlight.pipeline.tracking.lineage import Lineage, ModelVersion, Run, collect_ids
from firstlight.pipeline.tracking.run_file import RUN_FILE, read_run_file

if TYPE_CHECKING:
    from firstlight.pipeline.tracking.connection import MlflowClient


STORES_FOLDER = "stores"


@dataclass(frozen=True)
class DeletionPlan:
    """Everything that a deletion removes.

    `models` are ids of logged models. `paths` are folders of stages, and the files in which a recipe remembers its
    runs; together they have `num_bytes`.
    """

    runs: tuple[Run, ...]
    versions: tuple[ModelVersion, ...]
    models: tuple[str, ...]
    paths: tuple[Path, ...]
    num_bytes: int

    def summary_lines(self) -> Iterator[str]:
        """Yields what is deleted, for the question before the deletion."""
        runs = ", ".join(f"{run.name} ({run.short_id})" for run in self.runs)
        yield f"{format_count(len(self.runs), 'run')}: {runs}"
        if self.versions:
            references = (v.reference + (f" (version {v.version})" if v.aliases else "") for v in self.versions)
            yield f"{format_count(len(self.versions), 'model version')}: {', '.join(references)}"
        if self.paths:
            yield f"{format_count(len(self.paths), 'path')} on disk, {self.num_bytes / 1e6:,.1f} MB:"
            yield from (f"  {name_location(path)}" for path in self.paths)
        yield "and their artifacts in MLflow; stores of images are kept"


def plan_deletion(lineage: Lineage, client: "MlflowClient", run: Run) -> DeletionPlan:
    """Collects the run, its descendants in MLflow, and their models and files."""
    runs = list(_walk_descendants(lineage, run))
    run_ids = collect_ids(runs)
    versions = tuple(version for version in lineage.versions if version.run in run_ids)
    models = [model_id for one in runs if one.artifact for model_id in find_logged_models(lineage, client, one)]
    _fetch_notes(lineage.location.storage)
    paths = tuple(sorted(_find_paths(lineage.location.storage, run_ids)))
    return DeletionPlan(tuple(runs), versions, tuple(models), paths, sum(map(_measure_size, paths)))


def _fetch_notes(storage: Path) -> None:
    """Downloads the files of a storage in a bucket that say which runs it has."""
    mirror = find_mirror(storage)
    if mirror is None:
        return
    try:
        for unit in mirror.list_units(storage):
            if unit.parent.name != STORES_FOLDER and not CHECKPOINT_FOLDER.match(unit.name):
                # A damaged unit belongs to no run that is known.
                with contextlib.suppress(DamagedRecord):
                    mirror.fetch(unit, () if unit.name == NOTES_FOLDER else (RUN_FILE,))
    except OSError as error:
        raise UserError(explain_outage(mirror, error)) from None


def _walk_descendants(lineage: Lineage, run: Run) -> Iterator[Run]:
    yield run
    for child in lineage.list_children(run):
        yield from _walk_descendants(lineage, child)


def _find_paths(storage: Path, run_ids: set[str]) -> Iterator[Path]:
    """Yields the folders of stages that belong to one of the runs, and the files in which recipes remember them."""
    for name, below, files in os.walk(storage):
        folder = Path(name)
        if folder == storage:
            below[:] = [name for name in below if name not in (STORES_FOLDER, "mlartifacts", STATE_FOLDER)]
        if RUN_FILE in files and _refers_to_any(folder / RUN_FILE, run_ids):
            below.clear()
            yield folder
        elif folder.name == NOTES_FOLDER:
            yield from (folder / name for name in files if _refers_to_any(folder / name, run_ids))
        elif RUN_FILE in files:
            below.clear()


def _refers_to_any(file: Path, run_ids: set[str]) -> bool:
    """Returns True if the file holds one of the ids; False also if it cannot be read."""
    try:
        return read_run_file(file).get("run_id") in run_ids
    except DamagedRecord:
        return False


def _measure_size(path: Path) -> int:
    """Returns the bytes of a file or folder; of a folder in a bucket those that are there."""
    mirror = find_mirror(path)
    if mirror is not None and path.is_dir():
        try:
            return sum(mirror.measure_unit(unit) for unit in mirror.list_units(path))
        except OSError as error:
            raise UserError(explain_outage(mirror, error)) from None
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def check_deletion(lineage: Lineage, plan: DeletionPlan) -> list[str]:
    """Returns one line for each other run that depends on what is deleted.

    Raises:
        UserError: a process is running one of the recipes.
    """
    for name in {recipe.name for run in plan.runs if (recipe := run if run.is_composite else lineage.find_recipe(run))}:
        process = find_lock_owner(lineage.location.storage / name)
        if process:
            raise UserError(f"run: {name!r} is being run by process {process}; stop it, or wait for it")
    return [*_encoder_consumers(lineage, plan.runs), *_recipes_that_share(lineage, plan.runs)]


def _encoder_consumers(lineage: Lineage, runs: Sequence[Run]) -> Iterator[str]:
    run_ids = collect_ids(runs)
    for run in runs:
        for consumer in lineage.list_consumers(run):
            if consumer.id not in run_ids:
                recipe = lineage.find_recipe(consumer)
                name = f"{consumer.name} ({consumer.short_id})" + (f" of {recipe.name}" if recipe else "")
                yield f"{name} started from the encoder of {run.name}"


def _recipes_that_share(lineage: Lineage, runs: Sequence[Run]) -> Iterator[str]:
    """Yields the recipes that use stages of other recipes, as those were already done."""
    run_ids = collect_ids(runs)
    for other in lineage.runs.values():
        stages = [
            run_id for key, value in other.tags.items() if key.startswith(STAGE_RUNS_PREFIX) for run_id in value.split()
        ]
        shared = [run for run in runs if run.id in stages]
        if other.id not in run_ids and shared and not _owns_stages(other, shared):
            yield f"the recipe {other.name} ({other.short_id}) also uses {', '.join(run.name for run in shared)}"


def _owns_stages(recipe: Run, stages: Sequence[Run]) -> bool:
    """Returns True if all stages are the recipe's own. It does not protect those: its next run makes them again."""
    return all(run.parent == recipe.id for run in stages)


def delete_runs(lineage: Lineage, client: "MlflowClient", plan: DeletionPlan) -> None:
    """Deletes everything in the plan."""
    # The files first: after an interruption, MLflow still knows what is left to delete.
    for path in plan.paths:
        _delete_mirrored(path)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    delete_records(lineage, client, plan.runs, plan.versions, plan.models)


def _delete_mirrored(path: Path) -> None:
    """Deletes a folder of a stage, or a file, from the bucket that it is mirrored in.

    Raises:
        StageFailed: the bucket cannot be written; names `storage`.
    """
    mirror = find_mirror(path)
    if mirror is None:
        return
    try:
        if path.is_dir():
            mirror.remove(path)
        else:
            mirror.remove_file(path)
    except OSError as error:
        raise StageFailed(explain_outage(mirror, error, "written")) from None
