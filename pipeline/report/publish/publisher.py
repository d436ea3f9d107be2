"""The contract of a publisher: what a finished stage leaves in its MLflow run, and the scores that tell its run from others."""

import re
from dataclasses import dataclass
from typing import Generic, TypeVar

from firstlight.pipeline.config.stages import StageConfig
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.client import Tracking
from firstlight.pipeline.tracking.lineage import Run
from firstlight.pipeline.train.context import StageContext

Section = TypeVar("Section", bound=StageConfig)


@dataclass(frozen=True)
class Score:
    """A value of a run, displayed times `scale` with its `unit`, and that of its baseline."""

    value: float
    against: float | None = None
    baseline: str = ""
    scale: float = 100.0
    unit: str = " %"


class StagePublisher(Generic[Section]):
    """Publishes stages of one kind. This class serves every kind that has no publisher of its own: it logs the kind's measures.

    The layout of the keys in MLflow is known to the publisher of a kind, and nowhere else.
    """

    def publish(self, tracking: Tracking, run_id: str, worker: StageContext, stage: Section, instance: StageInstance) -> None:
        """Logs what a finished instance has found into its run. Called on the driver; a repetition leaves the run as it is."""
        kind, numbers = stage_kind(stage), {}
        for measure in stage.measures:
            for arm in measure.arms:
                for split in ("val", "test"):
                    value = kind.read_score(stage, measure, arm, split, instance)
                    if value is not None:
                        numbers[f"{arm}/{measure.name}_{split}"] = value
        tracking.numbers(run_id, numbers)
        tracking.client.log_dict(run_id, instance.result or {}, "result.json")

    def summarise(self, run: Run) -> dict[str, Score]:
        """Returns the scores that lists of runs show, by what they measure; on test images if the stage scores some."""
        keys = [key for key in run.metrics if re.fullmatch(r"[\w-]+/\w+_test", key)]
        return {key.removesuffix("_test"): Score(run.metrics[key]) for key in keys}
