"""One attempt of the only worker of a training, as Ray makes it, in this process and with images decoded by it."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from firstlight.pipeline.run.launching.instances import run_instances
from firstlight.pipeline.stages.pretrain import PretrainStage
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train import watchdog
from firstlight.pipeline.train.context import StageContext

run_stage = PretrainStage.run
watch_process = watchdog.watch_process


def run_attempt(payload: dict[str, Any], timeout_s: float) -> None:
    """Runs the instances of `payload` (as `launch` makes it) as a worker on Ray does.

    The watchdog ends the process after `timeout_s`, which is shorter than a recipe can say.
    """

    def watch_shortly(folder: Path, seconds: float) -> AbstractContextManager[None]:
        assert seconds == payload["recipe"]["scale"]["collective_timeout_s"]
        return watch_process(folder, timeout_s)

    with (
        mock.patch.object(PretrainStage, "run", _run_without_ray_data),
        mock.patch.object(watchdog, "watch_process", watch_shortly),
    ):
        run_instances(payload, on_ray=True, device=torch.device("cpu"))


def _run_without_ray_data(kind: PretrainStage, context: StageContext, stage: Any, instance: StageInstance) -> None:
    run_stage(kind, StageContext.create(context.recipe, context.store, on_ray=False), stage, instance)
