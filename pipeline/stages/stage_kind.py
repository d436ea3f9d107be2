"""The contract of a kind of stage: all that the pipeline must know of it.

A new kind is a section (a `StageConfig`, without torch) in `sections/x.py` and a `StageKind` in `x.py`, with a line in
`sections/known.py` and one in `registry.py`, tests of both, and, if it has defaults, a file in `conf`. The base classes
give enough to run it, by `firstlight x` too, to resume it, to show its measures in tables, and to publish its numbers
and the encoder or model that it leaves in the folder of that name. Each method below adds one thing to that.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from pydantic import TypeAdapter
from torch import nn

from firstlight.pipeline.config.dataset import DatasetOptions
from firstlight.pipeline.config.measures import Measure
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schema import View
from firstlight.pipeline.config.stages import StageConfig, TrainingOptions
from firstlight.pipeline.data.sources import Source
from firstlight.pipeline.data.splits import Splits
from firstlight.pipeline.errors import UserError, one_line, suggest_valid
from firstlight.pipeline.records import DamagedRecord, check_shape
from firstlight.pipeline.stages.stage import ANY_RESULT, RESULT_ADVICE, StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.metrics import METRICS_FILE
from firstlight.tasks.nn.encoders import Encoder

StageSection = TypeVar("StageSection", bound=StageConfig)
# The scale of the measures that are shares of 0..1, shown in percent.
SHARE_SCALE = 100.0
RunsOn = Literal["workers", "driver", "driver+ray"]
# A batch that a worker holds: the number of its images, and the side of each view of an image in pixels.
StreamedBatch = tuple[int, Sequence[int]]


@dataclass(frozen=True)
class RecipeContext:
    """A recipe, its source of images and a fresh encoder, before any image is read."""

    recipe: Recipe
    source: Source
    # A network of the recipe's architecture, with fresh weights.
    encoder: Encoder
    # The networks besides the encoder that each stage makes, by stage; the checks of earlier stages fill it.
    networks: dict[str, dict[str, nn.Module]] = field(default_factory=dict)
    # The names of the tables of its images that each stage hands on, likewise.
    tables: dict[str, frozenset[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class MetricsFile:
    """A file of logged numbers that a stage writes while it works."""

    path: Path
    # The name in the terminal.
    label: str
    # The beginning of its numbers' keys in MLflow.
    prefix: str = ""


@dataclass(frozen=True)
class StageOutput:
    """Something that a user takes from a finished stage. `usage` is a line of Python that opens it."""

    name: str
    path: Path
    usage: str


class MeasuringPeriod(NamedTuple):
    """The number of epochs between two values of a number that is not logged with the steps, and its key."""

    epochs: int
    key: str


class StageKind(ABC, Generic[StageSection]):
    """A kind of stage. `section` is its part of a recipe; `runs_on` says where `run` is called.

    `workers` means on every training worker, under Ray Train or in this process; `driver` means in this process;
    `driver+ray` means in this process, with Ray started.
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

    def list_rounds(self, stage: StageSection) -> tuple[tuple[str, ...], ...]:
        """Returns the names of parts of an instance's work, in rounds; () if it has none.

        The parts of a round need nothing of each other, only what earlier rounds have left. Processes of one machine
        may do them, each by `run_part`, before one of them calls `run`.
        """
        return ()

    def run_part(self, context: StageContext, stage: StageSection, instance: StageInstance, part: str) -> None:
        """Does a part of the work of one stage with one seed, so that `run` finds it done. Result and files are those
        of `run` alone. Called again for the same part after a kill. It raises what `run` raises.
        """
        raise NotImplementedError(f"{type(self).__name__} has no parts")

    def metrics_files(self, stage: StageSection, instance: StageInstance) -> list[MetricsFile]:
        """Returns the files of logged numbers that `run` writes."""
        return [MetricsFile(instance.folder / METRICS_FILE, instance.label)]

    def list_deciding_facts(self, stage: StageSection, recipe: Recipe) -> dict[str, Any]:
        """Returns what decides the result besides the section of the stage, its encoder, the images and the code."""
        return {}

    # Checks, in the order in which they are made

    def check_encoder(self, name: str, stage: StageSection, recipe: Recipe, encoder: Encoder) -> None:
        """Checks the stage against an encoder of the recipe's architecture. `name` is the stage's: its keys start with
        `stages.<name>`.

        Raises:
            UserError: names the dotted key, the value and the valid values; so do all checks below.
        """

    def check_source(self, name: str, stage: StageSection, context: RecipeContext) -> None:
        """Checks the stage against the source of images and against the stages before it."""

    def check_reference(self, name: str, stage: StageSection, recipe: Recipe, folder: Path) -> None:
        """Checks the encoder or model from MLflow that the stage starts from, in its folder."""

    def check_companions(self, name: str, stage: StageSection, recipe: Recipe, companions: Mapping[str, Path]) -> None:
        """Checks what the stage needs besides an encoder from MLflow, in the folders `companions`."""

    def check_images(self, name: str, stage: StageSection, recipe: Recipe, splits: Splits) -> None:
        """Checks the stage against the images of a prepared store, for every seed of the recipe."""

    def check_companion_images(
        self, name: str, stage: StageSection, companions: Mapping[str, Path], store: str, splits: Splits
    ) -> None:
        """Checks that what the stage needs besides an encoder from MLflow is of its images. `store`: their hash."""

    # Results: where a value stands in `result.json` is known here and nowhere else

    def result_shape(self, stage: StageSection) -> TypeAdapter[Any]:
        """Returns the shape of `result.json` that the readers of a result rely on."""
        return ANY_RESULT

    def check_result(self, stage: StageSection, instance: StageInstance) -> None:
        """Checks the result of an instance, if it has finished: its shape, and that its measures can be read from it.

        Raises:
            DamagedRecord: names the file and what is wrong.
        """
        if instance.result is None:
            return
        file = str(instance.result_file)
        check_shape(instance.result, self.result_shape(stage), file, RESULT_ADVICE)
        for measure in stage.measures:
            for arm, split in itertools.product(measure.arms, ("val", "test")):
                try:
                    value = self.read_score(stage, measure, arm, split, instance)
                except (KeyError, TypeError, AttributeError, ValueError) as error:
                    problem = f"{measure.name} of {arm}: {type(error).__name__} {one_line(error)}"
                    raise DamagedRecord(f"{file}: is damaged: {problem}; {RESULT_ADVICE}") from None
                is_share = measure.scale == SHARE_SCALE and not measure.only_if_expected
                if is_share and value is not None and not (0.0 <= value <= 1.0 or math.isnan(value)):
                    problem = f"{measure.name} of {arm} is {value:g}; valid: 0 to 1"
                    raise DamagedRecord(f"{file}: is damaged: {problem}; {RESULT_ADVICE}")

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

    def list_warnings(self, name: str, stage: StageSection) -> tuple[str, ...]:
        """Returns sentences about settings that are valid and known to fail, each with its dotted key.

        They are shown before the stage runs, and in the report.
        """
        return ()

    def list_image_notes(self, name: str, stage: StageSection, dataset: DatasetOptions) -> tuple[str, ...]:
        """Returns lines about what the stage does otherwise with these images than with others, each with its key."""
        return ()

    def outputs(self, stage: StageSection, instance: StageInstance) -> list[StageOutput]:
        """Returns what a user takes from a finished instance, with the code that opens it."""
        return []

    def deviations(self, stage: StageSection) -> tuple[str, ...]:
        """Returns sentences about the known differences from the paper that the stage follows."""
        return ()

    # Searches

    def objectives(self, stage: StageSection) -> tuple[str, ...]:
        """Returns the names by which a search can judge trials; "" stands for the stage itself."""
        return tuple(measure.name for measure in stage.measures)

    def is_share_objective(self, stage: StageSection, name: str) -> bool:
        """Returns True if the values of an objective are shares of 0..1."""
        shown = [measure for measure in stage.measures if not measure.only_if_expected]
        return any((measure.name, measure.scale) == (name, SHARE_SCALE) for measure in shown)

    def logs_objective(self, stage: StageSection, name: str) -> bool:
        """Returns True if the values of an objective are logged during the training, not only at its end."""
        return False

    def find_measuring_period(self, stage: StageSection, name: str) -> MeasuringPeriod | None:
        """Returns how often the values of an objective are measured; None if they are logged with the steps."""
        return None

    def list_checkpoint_shapes(
        self, stage: StageSection, recipe: Recipe, classes: int
    ) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes of all tensors in a checkpoint of the training, but for those of the optimiser."""
        return {}

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

    # Trainings

    def list_views(self, stage: StageSection, dataset: DatasetOptions) -> list[View]:
        """Returns the views of an image that a training takes, in their order. By default one, of a stage with
        `TrainingOptions`.
        """
        if not isinstance(stage, TrainingOptions):
            return []
        return [View(stage.augment or dataset.train_augment, dataset.image_size)]

    def count_trainings(self, stage: StageSection) -> int:
        """Returns how many trainings a seed of the stage makes."""
        return int(isinstance(stage, TrainingOptions))

    def train(self, context: StageContext, stage: StageSection, instance: StageInstance) -> None:
        """Trains from fresh weights as `run` does, and leaves nothing but logged numbers, so that a rate is measured.

        Raises:
            NotImplementedError: the kind has no training whose rate is asked for.
        """
        raise NotImplementedError(stage.kind)

    # Resources

    def streamed_batches(self, stage: StageSection, dataset: DatasetOptions, workers: int) -> list[StreamedBatch]:
        """Returns the batches that a worker holds at a time."""
        return []

    def table_bytes(self, stage: StageSection, encoder: Callable[[], Encoder], classes: int) -> int:
        """Returns the bytes that the stage keeps for every image it trains on. `encoder` makes one of the recipe's
        architecture.
        """
        return 0

    def count_epoch_images(self, stage: StageSection, splits: Splits, seed: int) -> tuple[int, int] | None:
        """Returns how many images an epoch is drawn from, and how many of them a batch takes; None if the stage does
        not train. By default, a stage with `TrainingOptions` trains on all.
        """
        return (len(splits.train), stage.batch_size) if isinstance(stage, TrainingOptions) else None

    def count_labelled_images(self, stage: StageSection, splits: Splits, seed: int) -> tuple[int, int] | None:
        """Returns how many labelled images go through passes of their own beside the epochs, and how many of them a
        batch takes; None if there are none.
        """
        return None
