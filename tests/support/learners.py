"""Small methods and tasks for tests. They import no test library, so a worker of a pool builds them quickly."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from firstlight.tasks.downstream.task import Task
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.pretrain.method import Method, TrainingInfo

AnyMethod = TypeVar("AnyMethod", bound=Method)
AnyTask = TypeVar("AnyTask", bound=Task)


def build_encoder(spec: Mapping[str, Any], image_size: int) -> Encoder:
    """A small encoder, by default a `convnet` of width 4; its weights are always the same."""
    torch.manual_seed(0)
    return Encoder({"name": "convnet", "width": 4, "depth": 2, **spec}, image_size)


def build_method(
    method: type[AnyMethod],
    info: TrainingInfo,
    spec: Mapping[str, Any],
    image_size: int = 8,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> AnyMethod:
    """A method around `build_encoder(spec, image_size)`, in single or double precision."""
    learner = method(build_encoder(spec, image_size), info, **options)
    # The condition keeps buffers in double precision, which `float` would make single.
    return learner.double() if dtype == torch.float64 else learner


def build_task(
    task: type[AnyTask], encoder: Encoder, classes: int, dtype: torch.dtype = torch.float32, **options: Any
) -> AnyTask:
    """A task on `encoder`, in single or double precision."""
    learner = task(encoder, classes, **options)
    return learner.double() if dtype == torch.float64 else learner
