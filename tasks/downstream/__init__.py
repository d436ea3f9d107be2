"""Downstream tasks by name, one page each."""

from firstlight.tasks.downstream.classify import Classification
from firstlight.tasks.downstream.classify_square import SquareLossClassification
from firstlight.tasks.downstream.detect import Detection
from firstlight.tasks.downstream.multilabel import MultilabelClassification
from firstlight.tasks.downstream.segment import Segmentation
from firstlight.tasks.downstream.task import Task
from firstlight.tasks.extensions.registry import Registry

_OWN_TASKS: dict[str, type[Task]] = {
    "classify": Classification,
    "classify_square": SquareLossClassification,
    "multilabel": MultilabelClassification,
    "segment": Segmentation,
    "detect": Detection,
}
TASKS = Registry("tasks", _OWN_TASKS, Task)
