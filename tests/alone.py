"""One attempt of a training worker that is alone, in a process of its own: what Ray's worker does, with its images from this process."""

from typing import Any

import torch

from pipeline import launch, pretrain
from pipeline.stage import Instance
from pipeline.worker import Worker


def run(payload: dict[str, Any]) -> None:
    launch._run(payload, on_ray=True, device=torch.device("cpu"))


def work(worker: Worker, stage: Any, instance: Instance) -> None:
    pretrain.work(Worker.start(worker.recipe, worker.store, on_ray=False), stage, instance)
