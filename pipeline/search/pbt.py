"""Population-based training (Jaderberg et al. 2017, "Population Based Training of Neural Networks").

The choice of the trials that copy networks, of their origins and of the settings with which they continue is a function
of the search and its ledger: a search that was killed and resumes makes the exchanges that it would have made.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import atomic_folder
from firstlight.pipeline.search.ledger import Trial
from firstlight.pipeline.search.objectives import parse_measure
from firstlight.pipeline.search.plan import SearchPlan
from firstlight.pipeline.search.sampler import draw_random_values
from firstlight.pipeline.search.space import Dimension, Pbt, Search, Values
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.stages.stage import TrainingSegment
from firstlight.pipeline.train.checkpoint import list_checkpoint_folders
from firstlight.pipeline.train.folder_manifest import FOLDER_MANIFEST, DamagedFileError, read_verified
from firstlight.pipeline.train.metrics import DROPPED_IDS_FILE, METRICS_FILE

# The folder in that of a trial for copies of the checkpoints of other trials that it continues from.
COPIED_FOLDER = "handed"


@dataclass(frozen=True)
class Exchange:
    """A trial continues with the networks of another one, `origin`, and with `values`."""

    trial: int
    origin: int
    values: Values


def select_exchanges(search: Search, resting: Sequence[Trial]) -> list[Exchange]:
    """Chooses one of the best trials to copy for each of the worst `quantile` (truncation selection, section 4.1).

    Trials are ranked by the value at the end of their last segment; of equal ones, the first is better. Returns [] for
    fewer than two trials.
    """
    scheduler, objective = search.scheduler, search.scheduler_objective
    assert isinstance(scheduler, Pbt)
    assert objective is not None
    sign = 1.0 if objective[1] == "max" else -1.0
    ranked = sorted(resting, key=lambda trial: (-sign * trial.parts[-1].value, trial.number))
    count = min(int(np.ceil(len(ranked) * scheduler.quantile)), len(ranked) // 2)
    exchanges = []
    for trial in ranked[len(ranked) - count :]:
        rng = np.random.default_rng((search.seed, trial.number, len(trial.parts)))
        origin = ranked[int(rng.integers(count))]
        exchanges.append(Exchange(trial.number, origin.number, explore_values(search, origin.values, rng)))
    return sorted(exchanges, key=lambda exchange: exchange.trial)


def explore_values(search: Search, values: Values, rng: np.random.Generator) -> Values:
    """Returns the settings, each perturbed or, with probability `resample`, drawn from the space."""
    scheduler = search.scheduler
    assert isinstance(scheduler, Pbt)
    drawn = draw_random_values(search, int(rng.integers(2**31)))
    explored = {}
    for key, dimension in search.space.items():
        resample, up = rng.random() < scheduler.resample, bool(rng.random() < 0.5)
        perturbed = perturb_value(dimension, values[key], scheduler.factors[up], up)
        explored[key] = drawn[key] if resample else perturbed
    return explored


def perturb_value(dimension: Dimension, value: Any, factor: float, up: bool) -> Any:
    """Returns a number times `factor`, within its range and on its grid, and at least one step away from the number.

    A listed value becomes the next one (`up`) or the previous one, if there is one.
    """
    if dimension.listed_values:
        index = dimension.listed_values.index(value) + (1 if up else -1)
        return dimension.listed_values[min(max(index, 0), len(dimension.listed_values) - 1)]
    low, high, *step = dimension.range_bounds
    if not step and not dimension.randint:
        return float(np.clip(value * factor, low, high))
    size = step[0] if step else 1
    old = round((value - low) / size)
    new = round((value * factor - low) / size)
    if new == old:
        new += 1 if up else -1
    perturbed = low + size * min(max(new, 0), int((high - low) / size + 1e-9))
    return int(perturbed) if dimension.randint else float(perturbed)


def copy_checkpoint(training: Path, folder: Path, end: int) -> Path | None:
    """Copies the newest checkpoint of a training, and what the training has logged, into the folder of another trial.

    The copy is complete or does not exist. Returns its folder, None if there is no checkpoint or it is damaged.
    """
    target = folder / COPIED_FOLDER / str(end)
    if target.exists():
        return target
    whole = [path for path in list_checkpoint_folders(training / "checkpoints") if (path / FOLDER_MANIFEST).exists()]
    if not whole:
        return None
    checkpoint = whole[-1]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_folder(target) as copied:
            shutil.copytree(checkpoint, copied / "checkpoints" / checkpoint.name)
            for name in (METRICS_FILE, DROPPED_IDS_FILE):
                if (training / name).exists():
                    shutil.copy2(training / name, copied / name)
            read_verified(copied / "checkpoints" / checkpoint.name)
    except DamagedFileError:
        return None
    return target


def apply_exchanges(
    search: Search, resting: Sequence[Trial], find_folder: Callable[[Trial], Path]
) -> list[tuple[Trial, str]]:
    """Copies checkpoints between paused trials, and then changes these trials in place: all of them or none.

    `find_folder` returns the folder of a trial. Returns the trials that have other networks now, each with the folder
    of the training that the networks replace.
    """
    by_number = {trial.number: trial for trial in resting}
    copied = []
    for exchange in select_exchanges(search, resting):
        trial, origin = by_number[exchange.trial], by_number[exchange.origin]
        if copy_checkpoint(Path(origin.training), find_folder(trial), trial.parts[-1].end):
            copied.append(exchange)
    for trial in resting:
        trial.origin = None
    exchanged = []
    for exchange in copied:
        # The origin keeps its own networks: no trial is both among the best and among the worst.
        trial, origin = by_number[exchange.trial], by_number[exchange.origin]
        last = origin.parts[-1]
        exchanged.append((trial, trial.training))
        trial.values, trial.origin = exchange.values, exchange.origin
        trial.before = origin.before + ([(last.end, last.values)] if last.values != exchange.values else [])
    return exchanged


def schedule_next_segment(scheduler: Pbt, trial: Trial, length: int) -> None:
    """Sets where the next segment of a trial ends. `length`: that of its whole training, in its unit."""
    until = len(trial.parts) * scheduler.interval + scheduler.interval
    trial.until, trial.resting = until if until < length else None, False


def count_segments(scheduler: Pbt, length: int) -> int:
    """Returns the number of segments of a training of so many epochs or steps, the unit of `interval`."""
    return -(-length // scheduler.interval)


def max_segments(plan: SearchPlan) -> int:
    """Returns the maximum number of segments of a trial, which is 1 if the trials are no population."""
    scheduler = plan.search.scheduler
    return count_segments(scheduler, plan.max_length.count) if isinstance(scheduler, Pbt) else 1


def next_training_segment(plan: SearchPlan, trial: Trial, folder: Path) -> TrainingSegment | None:
    """Returns the segment that a trial trains next, None if the trials are no population."""
    if not isinstance(plan.search.scheduler, Pbt) or plan.search.scheduler_objective is None:
        return None
    begin = folder / COPIED_FOLDER / str(trial.parts[-1].end) if trial.origin is not None else None
    stage = parse_measure(plan.search.scheduler_objective[0]).stage
    return TrainingSegment(stage, tuple(trial.before), begin, trial.until)


def check_networks(plan: SearchPlan, classes: int) -> None:
    """Checks that networks and tables have the same shapes at every end of the space, so that trials can copy them.

    Raises:
        UserError: names the key, and the first tensor that differs.
    """
    if not isinstance(plan.search.scheduler, Pbt):
        return
    corners = plan.corner_values()
    first = _checkpoint_shapes(plan, corners[0], classes)
    for values in corners[1:]:
        shapes = _checkpoint_shapes(plan, values, classes)
        for name in sorted(first.keys() | shapes.keys()):
            if first.get(name) != shapes.get(name):
                key = next(key for key in values if values[key] != corners[0][key])
                raise UserError(
                    f"space.{key}: cannot change in the middle of a training: {name} is "
                    f"{_format_shape(shapes.get(name))} with {values[key]!r} and {_format_shape(first.get(name))} with "
                    f"{corners[0][key]!r}; valid: settings that do not change the shapes of the networks"
                )


def _checkpoint_shapes(plan: SearchPlan, values: Values, classes: int) -> Mapping[str, tuple[int, ...]]:
    """Returns the shapes of the tensors in a checkpoint of the training that the scheduler decides about."""
    assert plan.search.scheduler_objective is not None
    recipe = plan.trial_recipe(values)
    stage = recipe.stages[parse_measure(plan.search.scheduler_objective[0]).stage]
    return stage_kind(stage).list_checkpoint_shapes(stage, recipe, classes)


def _format_shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape)) or "a number"
