"""One attempt of a training worker that is alone, in a process of its own: what Ray's worker does, with its images from this process."""

from typing import Any

import torch

from firstlight.pipeline.run import launch
from firstlight.pipeline.stages import pretrain
from firstlight.pipeline.stages.stage import Instance
from firstlight.pipeline.train.context import Worker


def run(payload: dict[str, Any]) -> None:
    launch._run(payload, on_ray=True, device=torch.device("cpu"))


def work(worker: Worker, stage: Any, instance: Instance) -> None:
    pretrain.work(Worker.start(worker.recipe, worker.store, on_ray=False), stage, instance)
