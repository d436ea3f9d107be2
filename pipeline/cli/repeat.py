"""`firstlight repeat`: a recipe run again from what MLflow has of it, and whether its numbers are the same."""

import copy
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from firstlight.pipeline.config.recipe import Recipe, override, parse
from firstlight.pipeline.errors import StageFailed, UserError, suggest_valid
from firstlight.pipeline.run.runner import Repeats
from firstlight.pipeline.stages.stage import code_version
from firstlight.pipeline.tracking.lineage import Lineage, Run, read
from firstlight.pipeline.tracking.location import Records

MAY_DIFFER = (
    "name",
    "storage",
    "dataset.root",
    "dataset.list",
    "dataset.download",
    "dataset.extends",
    "tracking",
    "scale",
)
SPEED = re.compile(r"(^|/)(images_per_s|data_wait|time_)")  # numbers of the machine, not of the recipe
SHOWN = 20  # differences that are listed


@dataclass(frozen=True)
class Original:
    """A run of a recipe, and its recipe."""

    lineage: Lineage
    run: Run
    recipe: dict[str, Any]

    @cached_property
    def stages(self) -> list[Run]:
        return [run for run in self.lineage.stages(self.run) if run.kind != "prepare"]

    @property
    def repeats(self) -> Repeats:
        return Repeats(self.run.id, self.run.store, self.lineage.records)


def original(records: Records, text: str) -> Original:
    """The run that `text` means, and what it logged.

    Raises:
        UserError: there is none, or it is no run of a recipe.
    """
    import mlflow

    lineage, _ = read(records)
    run = lineage.find(text)
    if not run.whole or run.kind == "search":
        recipe = lineage.recipe(run)
        valid = f"; valid: its recipe {recipe.name}, {recipe.id}" if recipe else ""
        raise UserError(f"run: {run.name} ({run.short}) is a run of kind {run.kind}; a recipe's can be repeated{valid}")
    try:
        raw = mlflow.artifacts.load_dict(f"{run.artifacts}/recipe.json")
    except Exception as error:
        raise UserError(
            f"run: {run.name} ({run.short}) has no recipe.json that can be read: {str(error).splitlines()[0][:200]}"
        ) from None
    return Original(lineage, run, raw)


def recipe_of(original: Original, overrides: Sequence[str]) -> Recipe:
    """As it ran, with the encoders that it took pinned; it registers nothing, and has a name of its own, so that nothing of before counts as done.

    Raises:
        UserError: an override of what decides the numbers.
    """
    for word in overrides:
        key = word.partition("=")[0]
        if not any(key == may or key.startswith(f"{may}.") for may in MAY_DIFFER):
            raise UserError(f"{key}: cannot differ in a repetition; {suggest_valid(key, MAY_DIFFER)}")
    raw = copy.deepcopy(original.recipe)
    raw["name"] = f"{raw['name']}-repeat"
    raw["storage"] = "runs"
    raw["tracking"] = {**raw["tracking"], "uri": None}
    for name, stage in raw["stages"].items():
        if "register_as" in stage:
            stage["register_as"] = None
        if stage.get("encoder") not in (None, "previous"):
            ran = next((run for run in original.stages if run.stage == name and run.encoder), None)
            made_by = original.lineage.source_id(ran) if ran else None
            stage["encoder"] = f"runs:/{made_by}/encoder" if made_by else stage["encoder"]
    override(raw, tuple(overrides))
    return parse(raw)


def check_code(original: Original, console: Console, exact: bool) -> None:
    """Tell of other code.

    Raises:
        UserError: it is other code, and `exact`.
    """
    then, now = original.run.params.get("code", "unknown"), code_version()
    if then == now:
        return
    commit = original.run.tags.get("mlflow.source.git.commit")
    told = f"the code differs: this is {now[:12]}, the run was made by {then[:12]}{f' (git commit {commit[:12]})' if commit else ''}"
    if exact:
        raise UserError(f"--exact: {told}")
    console.print(f"[yellow]note[/] {told}; the numbers may differ", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Number:
    """One number of a stage, then and now; None: it is missing."""

    stage: str
    key: str
    then: float | None
    now: float | None

    @property
    def same(self) -> bool:
        if self.then is None or self.now is None:
            return False
        return self.then == self.now or (math.isnan(self.then) and math.isnan(self.now))


@dataclass(frozen=True)
class Compared:
    """All numbers, and for each encoder whether its bits are the same (as a number that is 1)."""

    title: str
    numbers: tuple[Number, ...]

    @property
    def different(self) -> list[Number]:
        return [number for number in self.numbers if not number.same]

    def check(self) -> None:
        """Raises `StageFailed` where a number differs."""
        if self.different:
            raise StageFailed(f"repeat: {len(self.different):,} of {len(self.numbers):,} numbers differ")


def compare(original: Original, recipe: Recipe) -> Compared:
    """Every number of every stage of the newest repetition beside that of the original; only speeds are left out."""
    lineage, _ = read(Records.of(recipe))
    mine = [
        run
        for run in lineage.tops()
        if run.tags.get("firstlight.repeats") == original.run.id and run.name == recipe.name
    ]
    if not mine:
        raise UserError(f"repeat: no run of {recipe.name!r} that repeats {original.run.id} is in {lineage.records.uri}")
    now = {run.name: run for run in lineage.stages(mine[0])}
    found = [number for then in original.stages for number in _numbers(then, now.get(then.name))]
    title = f"{original.run.name} ({original.run.short}) and its repetition {mine[0].name} ({mine[0].short})"
    return Compared(title, tuple(found))


def _numbers(then: Run, now: Run | None) -> Iterator[Number]:
    keys = {**then.metrics, **(now.metrics if now else {})}
    for key in sorted(key for key in keys if not SPEED.search(key)):
        yield Number(then.name, key, then.metrics.get(key), now.metrics.get(key) if now else None)
    if then.model is not None and now is not None and now.model is not None:
        yield Number(then.name, "the encoder's bits", 1.0, float(_bits(then) == _bits(now)))


def _bits(run: Run) -> Any:
    """The sha256 sums of the files of an encoder."""
    import mlflow

    return json.loads(mlflow.artifacts.load_text(f"{run.artifacts}/encoder/manifest.json"))["files"]


def table(found: Compared) -> Group:
    """A row for each stage and seed, then the numbers that differ."""
    out = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("stage", "numbers", "the same", "largest difference"):
        out.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in dict.fromkeys(number.stage for number in found.numbers):
        mine = [number for number in found.numbers if number.stage == stage]
        same = sum(number.same for number in mine)
        apart = [abs(n.then - n.now) for n in mine if n.then is not None and n.now is not None and not n.same]
        style = "green" if same == len(mine) else "red"
        out.add_row(stage, str(len(mine)), Text(str(same), style=style), f"{max(apart):.3g}" if apart else "")
    parts: list[Any] = [Text(found.title, style="bold"), out]
    for number in found.different[:SHOWN]:
        parts.append(Text(f"{number.stage}  {number.key}: was {_told(number.then)}, is {_told(number.now)}"))
    if len(found.different) > SHOWN:
        parts.append(Text(f"and {len(found.different) - SHOWN:,} more"))
    if not found.different:
        parts.append(Text(f"all {len(found.numbers):,} numbers are the same", style="green"))
    return Group(*parts)


def _told(value: float | None) -> str:
    return "missing" if value is None else repr(value)
