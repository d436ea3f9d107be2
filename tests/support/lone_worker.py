"""One attempt of the only worker of a training, as Ray makes it, in this process and with images decoded by it."""

from typing import Any
from unittest import mock

import torch

from firstlight.pipeline.run import launch
from firstlight.pipeline.stages.pretrain import PretrainStage
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext

run_stage = PretrainStage.run


def run_attempt(payload: dict[str, Any]) -> None:
    """Runs the instances of `payload` (as `launch` makes it) as a worker on Ray does."""
    with mock.patch.object(PretrainStage, "run", _run_without_ray_data):
        launch._run_instances(payload, on_ray=True, device=torch.device("cpu"))


def _run_without_ray_data(kind: PretrainStage, worker: StageContext, stage: Any, instance: StageInstance) -> None:
    run_stage(kind, StageContext.create(worker.recipe, worker.store, on_ray=False), stage, instance)
