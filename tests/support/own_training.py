"""A kind of stage that trains an encoder, which Firstlight does not know: what its section and its kind say is used."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
import torch

from firstlight.pipeline.config.dataset import DatasetOptions
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schema import EncoderSection, View
from firstlight.pipeline.config.stages import STAGE_SECTIONS, StageConfig, TrainingOptions
from firstlight.pipeline.stages.artifacts.encoder_folder import save_encoder
from firstlight.pipeline.stages.registry import STAGES, register_stage
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.stages.stage_kind import MeasuringPeriod, StageKind
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.metrics import append_row
from firstlight.tasks.collective import barrier, rank
from firstlight.tasks.nn.encoders import Encoder

SECTION: dict[str, Any] = {
    "kind": "own_training",
    "epochs": 3,
    "batch_size": 32,
    "optimizer": {"name": "SGD", "lr": 0.1},
}


class OwnTraining(StageConfig, TrainingOptions):
    """Makes an encoder in a way of its own."""

    kind: Literal["own_training"]
    taught: bool = False
    every: int = 2
    width: int = 4

    makes_encoder: ClassVar[bool] = True
    changeable_keys: ClassVar[tuple[str, ...]] = ("optimizer", "width")
    encoder_use: ClassVar[str] = "by magic"
    command_help: ClassVar[str] = "Run the trainings of an own kind."

    @property
    def teacher(self) -> EncoderSection:
        return SimpleNamespace(weights=None, model_dump=lambda **_: {}) if self.taught else None


class OwnTrainingStage(StageKind[OwnTraining]):
    """An encoder whose weights are drawn, and logged numbers."""

    section = OwnTraining

    def run(self, context: StageContext, stage: OwnTraining, instance: StageInstance) -> None:
        if rank() == 0:
            torch.manual_seed(instance.seed)
            append_row(instance.folder, {"step": 1, "of": 1, "loss": 0.5, "images_per_s": 9.0, "time": 1.0})
            encoder = Encoder(context.recipe.network_spec, context.recipe.dataset.image_size)
            save_encoder(encoder, instance.folder / "encoder", {"seed": instance.seed})
            instance.write_result({})
        barrier()

    def list_views(self, stage: OwnTraining, dataset: DatasetOptions) -> list[View]:
        return [View(dataset.train_augment, 2 * dataset.image_size)] * 2

    def count_trainings(self, stage: OwnTraining) -> int:
        return 5

    def list_image_notes(self, name: str, stage: OwnTraining, dataset: DatasetOptions) -> tuple[str, ...]:
        return (f"stages.{name}.kind: sees images of {dataset.image_size} pixels twice as large",)

    def objectives(self, stage: OwnTraining) -> tuple[str, ...]:
        return ("loss", "sharpness")

    def logs_objective(self, stage: OwnTraining, name: str) -> bool:
        return True

    def find_measuring_period(self, stage: OwnTraining, name: str) -> MeasuringPeriod | None:
        return MeasuringPeriod(stage.every, "every") if name == "sharpness" else None

    def list_checkpoint_shapes(self, stage: OwnTraining, recipe: Recipe, classes: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (stage.width, classes)}


@contextmanager
def know_own_training() -> Iterator[None]:
    """Makes the kind known for a while."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(STAGES, "own_training", None)
        patched.setitem(STAGE_SECTIONS, "own_training", OwnTraining)
        register_stage(OwnTrainingStage())
        yield
