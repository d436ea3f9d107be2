"""The functions of `import firstlight as fl`: recipes, searches and what they leave, without the command line.

`firstlight/__init__.py` lists their names, and imports this module when one of them is used first.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console

# Its import makes the kinds of stages known to recipes.
import firstlight.pipeline.stages.registry  # noqa: F401
from firstlight.pipeline.config import load
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.manifest import MANIFEST_FILE
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.image_encoder import ImageEncoder
from firstlight.pipeline.notebook import open_console
from firstlight.pipeline.report.page_parts import REPORT_FILE
from firstlight.pipeline.report.scores.result_view import render_result
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.search.checks import load_checked_plan
from firstlight.pipeline.search.progress import summarise_search
from firstlight.pipeline.search.search import SearchResult, run_search
from firstlight.pipeline.stages import embed
from firstlight.pipeline.stages.artifacts import encoder_description, encoder_folder
from firstlight.pipeline.stages.features import feature_index
from firstlight.pipeline.stages.prediction.predictor import FineTunedModel
from firstlight.pipeline.stages.prediction.saved_model import read_model
from firstlight.pipeline.stages.score_rows import ScoreRow
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.lineage import Run, read_lineage
from firstlight.pipeline.tracking.location import TrackingLocation, parse_location
from firstlight.pipeline.tracking.references import OpenedExperiment, fetch_reference, pin_reference
from firstlight.pipeline.tracking.run_file import read_run_id

# The beginnings of a reference to an encoder in MLflow; anything else is a folder.
REFERENCE_PREFIXES = ("runs:/", "models:/")


@dataclass(frozen=True)
class RunResult:
    """The outcome of a run of a recipe. A notebook shows it as its headline, its tables and a link to the report."""

    # The rows of the table that the command line prints.
    table: tuple[ScoreRow, ...]
    # The HTML report. It does not exist if the disk refused it.
    report: Path
    # The MLflow run of the recipe; None if it had nothing to publish.
    run_id: str | None
    # The references of the encoders, for `load_encoder` and recipes, by the name of a pretraining stage, then by seed.
    stage_encoders: Mapping[str, Mapping[int, str]]
    # The folder of the encoder of the last pretraining stage's first seed; without a pretraining, of the encoder that
    # the stages start from; None if there is none.
    encoder_folder: Path | None = None
    # The recipe that was run.
    recipe: Recipe | None = field(default=None, repr=False)

    @property
    def encoders(self) -> Mapping[int, str]:
        """The references `runs:/<run>/encoder` of the last pretraining stage, by seed; {} if none was run."""
        return list(self.stage_encoders.values())[-1] if self.stage_encoders else {}

    @property
    def encoder(self) -> ImageEncoder:
        """The encoder of the last pretraining stage's first seed, in evaluation mode, on the CPU.

        Without a pretraining, it is the one that the stages start from: the given weights, or that of a reference.

        Raises:
            UserError: the run has no encoder, or its files are damaged.
        """
        if self.encoder_folder is None:
            raise UserError("encoder: the run has none; valid: load_encoder with a reference or a folder")
        return load_encoder(self.encoder_folder)

    def _repr_html_(self) -> str | None:
        """Returns what a notebook shows; None without a recipe, whose keys the tables need."""
        return None if self.recipe is None else render_result(self.recipe, self.table, self.report)


def load_recipe(path: str | Path, *overrides: str, smoke: bool = False) -> Recipe:
    """Reads, composes and checks a recipe.

    `overrides`: texts `key=value` with dotted keys, as on the command line. `smoke`: the recipe's trial run.

    Raises:
        UserError: one line for each mistake, which names the dotted key, the value and the valid values.
    """
    return load.load_recipe(Path(path), overrides, smoke)


def run(recipe: Recipe, *, only: str | None = None, quiet: bool = False, console: Console | None = None) -> RunResult:
    """Does what is left to do of a recipe, as `firstlight run` does. Finished work is not done twice.

    `only`: a kind of stage (or `prepare`), as `firstlight <kind>` does. Progress is shown in the cell of a notebook or
    on stderr, or in `console`; nowhere if `quiet`.

    Raises:
        UserError: a mistake that the user can correct, found before the work starts where possible.
        StopTraining, StageFailed: a stage failed.
        Unpublished: all was done, but MLflow is unreachable; the next run publishes what is missing.
    """
    with open_console(console, quiet) as opened:
        ran = run_recipe(recipe, opened, only)
    encoders = _list_encoders(recipe, ran.instances)
    made = [one for one in ran.instances if recipe.stages[one.stage].makes_encoder]
    first = next((one.folder / "encoder" for one in made if one.stage == made[-1].stage), None)
    if not made:
        first = next((folder for one in ran.instances if (folder := one.given or one.encoder) is not None), None)
    return RunResult(tuple(ran.rows), ran.folder / REPORT_FILE, ran.run_id, encoders, first, recipe)


def _list_encoders(recipe: Recipe, instances: Sequence[StageInstance]) -> dict[str, dict[int, str]]:
    found: dict[str, dict[int, str]] = {}
    for instance in instances:
        if recipe.stages[instance.stage].makes_encoder:
            found.setdefault(instance.stage, {})[instance.seed] = f"runs:/{read_run_id(instance.folder)}/encoder"
    return found


def search(
    file: str | Path, *overrides: str, quiet: bool = False, console: Console | None = None, **settings: Any
) -> SearchResult:
    """Runs what has not been done yet of a search, as `firstlight search` does.

    `overrides`: texts `key=value` with keys of the search or of its recipe. `settings`: keys of the search, as
    `trials=20`. `quiet`, `console`: as for `run`.

    Raises:
        UserError: a mistake that the user can correct.
        StageFailed, StopTraining: all trials have failed, or the run of the recipe with the best setting has.
    """
    own = tuple(f"{key}={json.dumps(value)}" for key, value in settings.items())
    plan = load_checked_plan(Path(file), (*overrides, *own))
    with open_console(console, quiet) as opened:
        found = run_search(plan, opened)
        # The live table of the trials is gone now.
        opened.print(summarise_search(plan.search, found.trials, found.best, found.promoted))
    return found


def load_encoder(
    reference: str | Path,
    image_size: int | None = None,
    *,
    storage: str | Path = "runs",
    tracking_uri: str | None = None,
    experiment: str = "firstlight",
) -> ImageEncoder:
    """Returns a pretrained encoder in evaluation mode, on the CPU.

    `encoder(images)` takes (B, 3, S, S) floats in 0..1, without any other normalisation, and returns its feature maps
    (B, C, h, w), shallow to deep; `encoder.embed(images)` takes paths and images.

    Args:
        reference: `models:/name@alias`, `models:/name/version` or `runs:/<run>/encoder` of MLflow, or a folder.
        image_size: S, by default that of the pretraining.
        storage, tracking_uri, experiment: where MLflow's runs are; as in `list_runs`.

    Raises:
        UserError: there is no such encoder; it is damaged; or images of `image_size` are too small for it.
    """
    if not str(reference).startswith(REFERENCE_PREFIXES):
        return _open_encoder(Path(reference), image_size)
    tracking = OpenedExperiment.open(_locate_runs(storage, tracking_uri, experiment))
    pinned = pin_reference(tracking, str(reference), "load_encoder")
    with TemporaryDirectory(prefix="firstlight-") as folder:
        return _open_encoder(fetch_reference(tracking, pinned, Path(folder), "load_encoder"), image_size)


def _open_encoder(folder: Path, image_size: int | None) -> ImageEncoder:
    description = encoder_description.read_encoder_description(folder)
    spec, image_size = description["spec"], image_size or description["image_size"]
    try:
        encoder_folder.check_untrusted_encoder(folder, image_size)
        encoder = ImageEncoder(spec, image_size)
        encoder.load_state_dict(encoder_folder.load_encoder(folder, image_size).state_dict())
    except ValueError as error:
        raise UserError(f"image_size: {image_size} is not valid: {error}") from None
    encoder.eval()
    return encoder


def load_model(
    reference: str | Path,
    *,
    storage: str | Path = "runs",
    tracking_uri: str | None = None,
    experiment: str = "firstlight",
) -> FineTunedModel:
    """Returns a fine-tuned model in evaluation mode, on the CPU.

    `model.classes` are the names of its classes; `model.predict(images)` takes paths and images of any size.

    Args:
        reference: `models:/name@alias`, `models:/name/version` or `runs:/<run>/model` of MLflow, or a folder.
        storage, tracking_uri, experiment: where MLflow's runs are; as in `list_runs`.

    Raises:
        UserError: there is no such model, or it is damaged.
    """
    if not str(reference).startswith(REFERENCE_PREFIXES):
        return FineTunedModel(read_model(Path(reference)))
    tracking = OpenedExperiment.open(_locate_runs(storage, tracking_uri, experiment))
    pinned = pin_reference(tracking, str(reference), "load_model")
    with TemporaryDirectory(prefix="firstlight-") as folder:
        return FineTunedModel(read_model(fetch_reference(tracking, pinned, Path(folder), "load_model")))


def open_store(folder: str | Path) -> Store:
    """Opens a store of images: `ids(split)`, `labels(split)`, and `read(ids)`, the encoded images with their labels.

    Raises:
        UserError: the folder holds no store, or the store's manifest is damaged.
    """
    return Store.open(Path(folder))


def open_embeddings(folder: str | Path, split: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the (n,) ids and (n, d) embeddings that a stage `embed` has written, of one split or of all.

    `folder`: the folder of the stage's seed, or `embeddings` in it.

    Raises:
        UserError: a file is missing or damaged, or there is no such split.
    """
    return embed.open_embeddings(_find_artifact(Path(folder), embed.EMBEDDINGS_FOLDER), split)


def open_index(folder: str | Path) -> feature_index.FeatureIndex:
    """Opens the index that a stage `retrieve` has written. `search(queries, k)` returns (m, k) ids and cosines.

    `folder`: the folder of the stage's seed, or `index` in it. faiss's reader is not hardened: open only what your own
    runs have written.

    Raises:
        UserError: a file is missing or damaged.
    """
    return feature_index.open_index(_find_artifact(Path(folder), feature_index.INDEX_FOLDER))


def _find_artifact(folder: Path, name: str) -> Path:
    return folder / name if not (folder / MANIFEST_FILE).exists() and (folder / name).is_dir() else folder


def list_runs(
    *, storage: str | Path = "runs", tracking_uri: str | None = None, experiment: str = "firstlight"
) -> list[Run]:
    """Returns the runs of recipes, stages, searches and trials in MLflow, newest first.

    Args:
        storage: the folder that recipes name as `storage`; MLflow's database is in it.
        tracking_uri: MLflow's database or server, if it is another one.
        experiment: MLflow's experiment.

    Raises:
        UserError: nothing was run there, or the server or database cannot be read.
    """
    lineage, _ = read_lineage(_locate_runs(storage, tracking_uri, experiment))
    return sorted(lineage.runs.values(), key=lambda run: run.start, reverse=True)


def _locate_runs(storage: str | Path, tracking_uri: str | None, experiment: str) -> TrackingLocation:
    named = {"storage": str(storage), "tracking.uri": tracking_uri, "tracking.experiment": experiment}
    return parse_location([f"{key}={json.dumps(value)}" for key, value in named.items() if value is not None])
