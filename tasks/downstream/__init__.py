"""Downstream tasks by name, one page each."""

from tasks.downstream.classify import Classify
from tasks.downstream.task import Task

TASKS: dict[str, type[Task]] = {"classify": Classify}
