"""The contract of a kind of stage: all that the pipeline must know of it.

A new kind is a file in this folder with a section (a `StageConfig`) and a `StageKind`, and a line in `registry.py`.
What the base class gives is enough to run it, to resume it, to show its measures in tables and to publish its numbers;
each method below adds one thing to that.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from torch import nn

from firstlight.pipeline.config.measures import Measure
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.stages import StageConfig
from firstlight.pipeline.data.sources import Source
from firstlight.pipeline.data.splits import Splits
from firstlight.pipeline.errors import UserError, suggest_valid
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.metrics import METRICS_FILE
from firstlight.tasks.nn.encoders import Encoder

StageSection = TypeVar("StageSection", bound=StageConfig)
RunsOn = Literal["workers", "driver", "driver+ray"]


@dataclass(frozen=True)
class RecipeContext:
    """A recipe, its source of images and a fresh encoder, before any image is read."""

    recipe: Recipe
    source: Source
    # A network of the recipe's architecture, with fresh weights.
    encoder: Encoder
    # The networks besides the encoder that each stage makes, by stage; the checks of earlier stages fill it.
    networks: dict[str, dict[str, nn.Module]] = field(default_factory=dict)


@dataclass(frozen=True)
class MetricsFile:
    """A file of logged numbers that a stage writes while it works."""

    path: Path
    # What the terminal calls it.
    label: str
    # The beginning of its numbers' keys in MLflow.
    prefix: str = ""


class StageKind(ABC, Generic[StageSection]):
    """A kind of stage. `section` is its part of a recipe; `runs_on` says where `run` is called.

    workers: on every training worker, under Ray Train or in this process. driver: in this process. driver+ray: in this
    process, with Ray started.
    """

    section: type[StageSection]
    runs_on: RunsOn = "workers"

    @abstractmethod
    def run(self, context: StageContext, stage: StageSection, instance: StageInstance) -> None:
        """Does the work of one stage with one seed, and leaves `result.json` in the folder of `instance`.

        Called again for the same instance after a failure or a kill, until there is a `result.json`.

        Raises:
            StopTraining: the work cannot continue, and repeating it would not help.
            StageFailed: it failed for a reason that the user should see in one line.
        """

    def metrics_files(self, stage: StageSection, instance: StageInstance) -> list[MetricsFile]:
        """Returns the files of logged numbers that `run` writes."""
        return [MetricsFile(instance.folder / METRICS_FILE, instance.label)]

    # Checks, in the order in which they are made

    def check_encoder(self, name: str, stage: StageSection, recipe: Recipe, encoder: Encoder) -> None:
        """Checks the stage against an encoder of the recipe's architecture. `name` is the stage's: its keys start with
        `stages.<name>`.

        Raises:
            UserError: names the dotted key, the value and the valid values; so do all checks below.
        """

    def check_source(self, name: str, stage: StageSection, context: RecipeContext) -> None:
        """Checks the stage against the source of images and against the stages before it."""

    def check_companion(self, name: str, stage: StageSection, recipe: Recipe, folder: Path) -> None:
        """Checks the saved network in `folder`, which the stage needs besides its encoder, against the recipe."""

    def check_images(self, name: str, stage: StageSection, recipe: Recipe, splits: Splits) -> None:
        """Checks the stage against the images of a prepared store, for every seed of the recipe."""

    # Results: where a value stands in `result.json` is known here and nowhere else

    def read_score(
        self, stage: StageSection, measure: Measure, arm: str, split: str, instance: StageInstance
    ) -> float | None:
        """Returns the score of an arm on `split` (`val` or `test`), None if it was not scored.

        The base class reads `result[arm][measure][split]`.
        """
        result = instance.result or {}
        value = result.get(arm, {}).get(measure.name, {}).get(split)
        return None if value is None else float(value)

    def label_measure(self, stage: StageSection, measure: Measure, result: Mapping[str, Any]) -> str:
        """Returns what the table calls a measure, once there is a result."""
        return measure.label

    def describe(self, stage: StageSection, results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
        """Yields names and values that a reader of the report wants to know of the stage before its pictures."""
        yield from ()

    def deviations(self, stage: StageSection) -> tuple[str, ...]:
        """Returns sentences about the known differences from the paper that the stage follows."""
        return ()

    # Searches

    def objectives(self, stage: StageSection) -> tuple[str, ...]:
        """Returns the names by which a search can judge trials; "" stands for the stage itself."""
        return tuple(measure.name for measure in stage.measures)

    def logs_objective(self, stage: StageSection, name: str) -> bool:
        """Returns True if the values of an objective are logged during the training, not only at its end."""
        return False

    def check_objective(self, where: str, stage: StageSection, name: str, objective: str) -> None:
        """Checks an objective that `objectives` does not name. `objective` is its name with the stage's `name` before
        it.
        """

        valid = tuple(f"{name}.{one}" if one else name for one in self.objectives(stage))
        raise UserError(f"{where}: {objective!r} is not measured; {suggest_valid(objective, valid)}")

    def read_objective(self, stage: StageSection, name: str, instance: StageInstance) -> float:
        """Returns the value of an objective on held-out images, of a finished instance."""
        measure = next(measure for measure in stage.measures if measure.name == name)
        value = self.read_score(stage, measure, measure.arms[0], "val", instance)
        assert value is not None, f"{instance.label} has no {name} on held-out images"
        return value

    # Resources

    def streamed_batches(self, stage: StageSection, workers: int) -> list[tuple[int, int]]:
        """Returns the batches that a worker holds at a time, each as (images, views of each image)."""
        return []

    def table_bytes(self, stage: StageSection, encoder: Callable[[], Encoder], classes: int) -> int:
        """Returns the bytes that the stage keeps for every image it trains on. `encoder` makes one of the recipe's
        architecture.
        """
        return 0

    def count_epoch_images(self, stage: StageSection, splits: Splits, seed: int) -> tuple[int, int] | None:
        """Returns how many images an epoch is drawn from, and how many of them a batch takes; None if the stage does
        not train.
        """
        return None
