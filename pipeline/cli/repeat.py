"""`firstlight repeat`: runs a recipe again from its record in MLflow, and compares the numbers of both runs."""

import copy
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from firstlight.pipeline.config.load import apply_overrides, parse_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.errors import StageFailed, UserError, one_line, suggest_valid
from firstlight.pipeline.run.publishing import RepeatOf
from firstlight.pipeline.stages.code_version import code_version
from firstlight.pipeline.terminal import Column, build_table
from firstlight.pipeline.tracking.client import WEIGHTS_TAG
from firstlight.pipeline.tracking.lineage import Lineage, Run, read_lineage
from firstlight.pipeline.tracking.location import TrackingLocation
from firstlight.pipeline.tracking.references import read_json_artifact

CHANGEABLE_KEYS = (
    *("name", "storage", "tracking", "scale"),
    *("dataset.root", "dataset.list", "dataset.download", "dataset.extends"),
)
# Metrics of the machine, not of the recipe.
SPEED_METRIC = re.compile(r"(^|/)(images_per_(cpu_)?s|data_wait|time_|seconds\Z)")
MAX_DIFFERENCES_LISTED = 20
COMPARISON_COLUMNS = (
    Column("stage"),
    Column("numbers", numeric=True),
    Column("equal", numeric=True),
    Column("largest difference", numeric=True),
)


@dataclass(frozen=True)
class OriginalRun:
    """A run of a recipe, and the recipe as it was logged."""

    lineage: Lineage
    run: Run
    recipe: dict[str, Any]

    @cached_property
    def stages(self) -> list[Run]:
        return [run for run in self.lineage.list_stages(self.run) if run.kind != "prepare"]

    @property
    def repeats(self) -> RepeatOf:
        return RepeatOf(self.run.id, self.run.store, self.lineage.location)


def find_original(records: TrackingLocation, text: str) -> OriginalRun:
    """Returns the run that `text` identifies, with its logged recipe.

    Raises:
        UserError: no run matches, it is not a run of a recipe, or its recipe cannot be read.
    """
    lineage, _ = read_lineage(records)
    run = lineage.find_run(text)
    if not run.is_composite or run.kind == "search":
        recipe = lineage.find_recipe(run)
        valid = f"; valid: its recipe {recipe.name}, {recipe.id}" if recipe else ""
        found = f"{run.name} ({run.short_id}) is a run of kind {run.kind}"
        raise UserError(f"run: {found}; only a run of a recipe can be repeated{valid}")
    try:
        raw = read_json_artifact(run, "recipe.json")
        parse_recipe(raw)
    except Exception as error:
        found = f"{run.name} ({run.short_id}) has no readable recipe.json"
        raise UserError(f"run: {found}: {one_line(error)}") from None
    return OriginalRun(lineage, run, raw)


def recipe_to_repeat(original: OriginalRun, overrides: Sequence[str]) -> Recipe:
    """Returns the recipe as it ran, with its encoders pinned.

    It registers no model, and has another name, so that no earlier stage counts as done.

    Raises:
        UserError: an override changes what decides the numbers.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in CHANGEABLE_KEYS):
            raise UserError(f"{key}: cannot differ in a repetition; {suggest_valid(key, CHANGEABLE_KEYS)}")
    raw = copy.deepcopy(original.recipe)
    raw["name"] = f"{raw['name']}-repeat"
    raw["storage"] = "runs"
    raw["tracking"] = {**raw["tracking"], "uri": None}
    for stage in raw["stages"].values():
        if "register_as" in stage:
            stage["register_as"] = None
    recipe = parse_recipe(raw)
    for name in recipe.stages:
        source = recipe.encoder_source(name)
        if source and source.reference:
            raw["stages"][name]["encoder"] = _pinned_encoder(original, name) or source.reference
    if recipe.takes_given and (weights := _pinned_weights(original)):
        raw["encoder"]["weights"] = weights
    apply_overrides(raw, tuple(overrides))
    return parse_recipe(raw)


def _pinned_weights(original: OriginalRun) -> str | None:
    """Returns the given weights as the stages of a run recorded them, so that an alias means the same version."""
    return next((run.tags[WEIGHTS_TAG] for run in original.stages if WEIGHTS_TAG in run.tags), None)


def _pinned_encoder(original: OriginalRun, stage: str) -> str | None:
    """Returns the reference of the encoder that a stage started from, None if MLflow does not know its run."""
    run = next((run for run in original.stages if run.stage == stage and run.encoder), None)
    source_id = original.lineage.find_source_id(run) if run else None
    source = original.lineage.runs.get(source_id or "")
    return f"runs:/{source_id}/{(source.artifact if source else '') or 'encoder'}" if source_id else None


def check_code(original: OriginalRun, console: Console, exact: bool) -> None:
    """Prints a note if the run was made by other code.

    Raises:
        UserError: the code differs, and `exact` is set.
    """
    then, now = original.run.params.get("code", "unknown"), code_version()
    if then == now:
        return
    commit = original.run.tags.get("mlflow.source.git.commit")
    made_by = then[:12] + (f" (git commit {commit[:12]})" if commit else "")
    message = f"the code differs: this is {now[:12]}, the run was made by {made_by}"
    if exact:
        raise UserError(f"--exact: {message}")
    console.print(f"[yellow]note[/] {escape(message)}; the numbers may differ", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class ComparedNumber:
    """One number of a stage in both runs; None if a run does not have it."""

    stage: str
    key: str
    then: float | None
    now: float | None

    @property
    def is_same(self) -> bool:
        if self.then is None or self.now is None:
            return False
        return self.then == self.now or (math.isnan(self.then) and math.isnan(self.now))


@dataclass(frozen=True)
class Comparison:
    """The numbers of both runs. An encoder counts as one number, which is 1 in both if its files are identical."""

    title: str
    numbers: tuple[ComparedNumber, ...]

    @property
    def differing(self) -> list[ComparedNumber]:
        return [number for number in self.numbers if not number.is_same]

    def raise_if_different(self) -> None:
        """Raises `StageFailed` if a number differs."""
        if self.differing:
            raise StageFailed(f"repeat: {len(self.differing):,} of {len(self.numbers):,} numbers differ")


def compare_numbers(original: OriginalRun, recipe: Recipe) -> Comparison:
    """Compares every number of every stage of the newest repetition with the original, except speeds.

    Raises:
        UserError: the storage of `recipe` has no repetition of the original.
    """
    records = TrackingLocation.of(recipe)
    lineage, _ = read_lineage(records)
    repetitions = [
        run
        for run in lineage.list_roots()
        if run.tags.get("firstlight.repeats") == original.run.id and run.name == recipe.name
    ]
    if not repetitions:
        raise UserError(f"repeat: {records.uri} has no run of {recipe.name!r} that repeats {original.run.id}")
    newest = repetitions[0]
    now = {run.name: run for run in lineage.list_stages(newest)}
    numbers = [number for then in original.stages for number in _pair_numbers(then, now.get(then.name))]
    title = f"{original.run.name} ({original.run.short_id}) and its repetition {newest.name} ({newest.short_id})"
    return Comparison(title, tuple(numbers))


def _pair_numbers(then: Run, now: Run | None) -> Iterator[ComparedNumber]:
    keys = {**then.metrics, **(now.metrics if now else {})}
    for key in sorted(key for key in keys if not SPEED_METRIC.search(key)):
        yield ComparedNumber(then.name, key, then.metrics.get(key), now.metrics.get(key) if now else None)
    if then.model is not None and now is not None and now.model is not None:
        identical = _network_checksums(then) == _network_checksums(now)
        yield ComparedNumber(then.name, f"the {then.artifact}'s bits", 1.0, float(identical))


def _network_checksums(run: Run) -> Any:
    """Returns the sha256 sums of the files of an encoder or model; what its manifest has if that is another thing."""
    manifest = read_json_artifact(run, f"{run.artifact}/manifest.json")
    return manifest.get("files") if isinstance(manifest, dict) else manifest


def comparison_table(comparison: Comparison) -> Group:
    """Returns a table with a row for each stage and seed, followed by the numbers that differ."""
    parts: list[RenderableType] = [Text(comparison.title, style="bold"), _stages_table(comparison)]
    for number in comparison.differing[:MAX_DIFFERENCES_LISTED]:
        values = f"was {_format_number(number.then)}, is {_format_number(number.now)}"
        parts.append(Text(f"{number.stage}  {number.key}: {values}"))
    if len(comparison.differing) > MAX_DIFFERENCES_LISTED:
        parts.append(Text(f"and {len(comparison.differing) - MAX_DIFFERENCES_LISTED:,} more"))
    if not comparison.differing:
        parts.append(Text(f"all {len(comparison.numbers):,} numbers are equal", style="green"))
    return Group(*parts)


def _stages_table(comparison: Comparison) -> Table:
    groups: dict[str, list[ComparedNumber]] = {}
    for number in comparison.numbers:
        groups.setdefault(number.stage, []).append(number)
    return build_table(COMPARISON_COLUMNS, (_stage_row(stage, numbers) for stage, numbers in groups.items()))


def _stage_row(stage: str, numbers: Sequence[ComparedNumber]) -> tuple[RenderableType, ...]:
    num_equal = sum(number.is_same for number in numbers)
    differences = [abs(n.then - n.now) for n in numbers if n.then is not None and n.now is not None and not n.is_same]
    equal = Text(str(num_equal), style="green" if num_equal == len(numbers) else "red")
    return stage, str(len(numbers)), equal, f"{max(differences):.3g}" if differences else ""


def _format_number(value: float | None) -> str:
    return "missing" if value is None else repr(value)
