"""Downstream tasks by name, one page each."""

from tasks.downstream.classify import Classify
from tasks.downstream.classify_square import ClassifySquare
from tasks.downstream.detect import Detect
from tasks.downstream.multilabel import Multilabel
from tasks.downstream.segment import Segment
from tasks.downstream.task import Task

TASKS: dict[str, type[Task]] = {
    "classify": Classify,
    "classify_square": ClassifySquare,
    "multilabel": Multilabel,
    "segment": Segment,
    "detect": Detect,
}
