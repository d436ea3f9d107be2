"""Downstream tasks by name, one page each."""

from firstlight.tasks.downstream.classify import Classify
from firstlight.tasks.downstream.classify_square import ClassifySquare
from firstlight.tasks.downstream.detect import Detect
from firstlight.tasks.downstream.multilabel import Multilabel
from firstlight.tasks.downstream.segment import Segment
from firstlight.tasks.downstream.task import Task

TASKS: dict[str, type[Task]] = {
    "classify": Classify,
    "classify_square": ClassifySquare,
    "multilabel": Multilabel,
    "segment": Segment,
    "detect": Detect,
}
