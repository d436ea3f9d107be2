"""The end of a training by what it watched: whether the kNN accuracy on held-out images was still rising."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.stages import TrainingLength, TrainingOptions
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.metrics import METRICS_FILE, STEPS_PER_EPOCH_KEY, read_metrics

WATCHED_KNN = "watch_knn"
# The measurements that a curve needs before its end says anything.
MIN_MEASUREMENTS = 3
# The share of the measurements that are the end of a training.
END_SHARE = 0.25
# The smallest rise at the end that is told.
MIN_RISE = 0.005


@dataclass(frozen=True)
class RisingTraining:
    """A training that was still rising: the mean accuracies over seeds (0..1) `before` its end and at its end, at the
    epochs of the two.
    """

    stage: str
    length: TrainingLength
    epochs: tuple[float, float]
    before: float
    last: float


def find_rising_trainings(
    recipe: Recipe, instances: Sequence[StageInstance], num_held_out: int
) -> list[RisingTraining]:
    """Returns the finished pretrainings whose held-out accuracy was still rising at the end, in every seed.

    The rise must be larger than the standard error of an accuracy on `num_held_out` images.
    """
    found: list[RisingTraining] = []
    for name, stage in recipe.stages.items():
        finished = [one for one in instances if one.stage == name and one.result is not None]
        if not stage.makes_encoder or not isinstance(stage, TrainingOptions) or not finished:
            continue
        curves = [_read_curve(instance) for instance in finished]
        rising = _judge_end(name, stage.length, curves, num_held_out)
        found += [rising] if rising is not None else []
    return found


def _read_curve(instance: StageInstance) -> list[tuple[float, float]]:
    """Returns the (epoch, accuracy) pairs that a training has watched."""
    rows = read_metrics(instance.folder / METRICS_FILE)
    return [(row["step"] / row[STEPS_PER_EPOCH_KEY], row[WATCHED_KNN]) for row in rows if WATCHED_KNN in row]


def _judge_end(
    name: str, length: TrainingLength, curves: Sequence[Sequence[tuple[float, float]]], num_held_out: int
) -> RisingTraining | None:
    count = min(map(len, curves))
    if count < MIN_MEASUREMENTS or num_held_out < 1:
        return None
    back = max(1, round(END_SHARE * count))
    is_rising = all(curve[-1][1] == max(value for _, value in curve) > curve[-1 - back][1] for curve in curves)
    before, last = (sum(curve[k][1] for curve in curves) / len(curves) for k in (-1 - back, -1))
    error = math.sqrt(max(last * (1.0 - last), 0.0) / num_held_out)
    if not is_rising or last - before < max(MIN_RISE, error):
        return None
    return RisingTraining(name, length, (curves[0][-1 - back][0], curves[0][-1][0]), before, last)
