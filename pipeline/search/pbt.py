"""Population-based training (Jaderberg et al. 2017, "Population Based Training of Neural Networks"): which trials go on from the networks of which
others, and with which settings. A function of (search, what the ledger knows): a search that was killed exchanges what it would have exchanged."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from firstlight.pipeline.config.recipe import Pretrain
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.files import temporary_path
from firstlight.pipeline.run import preflight
from firstlight.pipeline.search.ledger import Trial
from firstlight.pipeline.search.sampler import drawn_anew
from firstlight.pipeline.search.space import Dimension, Pbt, Plan, Search, Values
from firstlight.pipeline.stages.stage import Passage
from firstlight.pipeline.train.checkpoint import MANIFEST, Damaged, verified
from firstlight.pipeline.train.metrics import METRICS, TAILS
from firstlight.tasks.nn.encoders import Encoder

HANDED = "handed"  # in the folder of a trial: the checkpoints that it goes on from


@dataclass(frozen=True)
class Exchange:
    """A trial that goes on from the networks of another, `origin`, with `values`."""

    trial: int
    origin: int
    values: Values


def exchanges(search: Search, resting: Sequence[Trial]) -> list[Exchange]:
    """Truncation selection (section 4.1): each of the worst `quantile` takes the networks of one of the best, by their last value; of equal ones
    the first is better. None for fewer than two."""
    scheduler, deciding = search.scheduler, search.deciding
    assert isinstance(scheduler, Pbt)
    assert deciding is not None
    sign = 1.0 if deciding[1] == "max" else -1.0
    ranked = sorted(resting, key=lambda trial: (-sign * trial.parts[-1].value, trial.number))
    count = min(int(np.ceil(len(ranked) * scheduler.quantile)), len(ranked) // 2)
    found = []
    for trial in ranked[len(ranked) - count :]:
        rng = np.random.default_rng((search.seed, trial.number, len(trial.parts)))
        origin = ranked[int(rng.integers(count))]
        found.append(Exchange(trial.number, origin.number, explored(search, origin.values, rng)))
    return sorted(found, key=lambda exchange: exchange.trial)


def explored(search: Search, values: Values, rng: np.random.Generator) -> Values:
    """The settings, each changed a little, or (with probability `resample`) drawn anew."""
    scheduler = search.scheduler
    assert isinstance(scheduler, Pbt)
    anew = drawn_anew(search, int(rng.integers(2**31)))
    found = {}
    for key, dimension in search.space.items():
        resampled, up = rng.random() < scheduler.resample, bool(rng.random() < 0.5)
        found[key] = anew[key] if resampled else changed(dimension, values[key], scheduler.factors[up], up)
    return found


def changed(dimension: Dimension, value: Any, factor: float, up: bool) -> Any:
    """A number times `factor`, within its range and on its grid, and a step of it away at least; of listed values the next one (`up`) or the one
    before, where there is one."""
    if dimension.listed:
        place = dimension.listed.index(value) + (1 if up else -1)
        return dimension.listed[min(max(place, 0), len(dimension.listed) - 1)]
    low, high, *step = dimension.bounds
    if not step and not dimension.randint:
        return float(np.clip(value * factor, low, high))
    size = step[0] if step else 1
    steps = round((value * factor - low) / size)
    here = round((value - low) / size)
    if steps == here:
        steps += 1 if up else -1
    found = low + size * min(max(steps, 0), int((high - low) / size + 1e-9))
    return int(found) if dimension.randint else float(found)


def hand_over(training: Path, place: Path, epochs: int) -> Path | None:
    """A copy of the newest checkpoint of a training, and of what it has logged, below the folder of another trial; whole or not there. None: that
    checkpoint is damaged."""
    target = place / HANDED / str(epochs)
    if target.exists():
        return target
    checkpoint = max(path.parent for path in training.glob(f"checkpoints/step-*/{MANIFEST}"))
    target.parent.mkdir(parents=True, exist_ok=True)
    copied = temporary_path(target.parent)
    try:
        shutil.copytree(checkpoint, copied / "checkpoints" / checkpoint.name)
        for name in (METRICS, TAILS):
            if (training / name).exists():
                shutil.copy2(training / name, copied / name)
        verified(copied / "checkpoints" / checkpoint.name)
        os.rename(copied, target)
    except Damaged:
        return None
    finally:
        shutil.rmtree(copied, ignore_errors=True)
    return target


def exchange(search: Search, resting: Sequence[Trial], place: Callable[[Trial], Path]) -> list[tuple[Trial, str]]:
    """Make the exchanges that are due between trials, which are changed in place: all of them, or none when this is cut short. The trials that
    have other networks now, and the folder of the training that each has given up. `place`: the folder of a trial."""
    by_number = {trial.number: trial for trial in resting}
    made = []
    for due in exchanges(search, resting):
        if hand_over(
            Path(by_number[due.origin].training), place(by_number[due.trial]), by_number[due.trial].parts[-1].epochs
        ):
            made.append(due)
    for trial in resting:
        trial.origin = None
    found = []
    for due in made:
        trial, origin = by_number[due.trial], by_number[due.origin]  # which goes on with its own: nobody is both
        last = origin.parts[-1]
        found.append((trial, trial.training))
        trial.values, trial.origin = due.values, due.origin
        trial.before = origin.before + ([(last.epochs, last.values)] if last.values != due.values else [])
    return found


def advance(scheduler: Pbt, trial: Trial, epochs: int) -> None:
    """Set the end of the next part of a trial whose training takes so many epochs."""
    until = len(trial.parts) * scheduler.interval + scheduler.interval
    trial.until, trial.resting = until if until < epochs else None, False


def parts_of(scheduler: Pbt, epochs: int) -> int:
    """That a training is made in."""
    return -(-epochs // scheduler.interval)


def passage(plan: Plan, trial: Trial, place: Path) -> Passage | None:
    """The part of its training that a trial makes next; None outside of a population."""
    if not isinstance(plan.search.scheduler, Pbt) or plan.search.deciding is None:
        return None
    begin = place / HANDED / str(trial.parts[-1].epochs) if trial.origin is not None else None
    return Passage(plan.search.deciding[0].partition(".")[0], tuple(trial.before), begin, trial.until)


def check_networks(plan: Plan, classes: int) -> None:
    """Every end of the space makes networks and tables of the same shapes: else one could not go on from another.

    Raises:
        UserError: names the key, and the first tensor that differs.
    """
    if not isinstance(plan.search.scheduler, Pbt):
        return
    corners = plan.corners()
    first = _shapes(plan, corners[0], classes)
    for values in corners[1:]:
        shapes = _shapes(plan, values, classes)
        for name in sorted(first.keys() | shapes.keys()):
            if first.get(name) != shapes.get(name):
                key = next(key for key in values if values[key] != corners[0][key])
                raise UserError(
                    f"space.{key}: cannot change in the middle of a training: {name} is {_told(shapes.get(name))} with {values[key]!r} and "
                    f"{_told(first.get(name))} with {corners[0][key]!r}; valid: settings that leave the networks as they are"
                )


def _shapes(plan: Plan, values: Values, classes: int) -> dict[str, tuple[int, ...]]:
    """Of all that a checkpoint of the training holds, but for the optimiser's state."""
    assert plan.search.deciding is not None
    recipe = plan.trial(values)
    stage = recipe.stages[plan.search.deciding[0].partition(".")[0]]
    assert isinstance(stage, Pretrain)
    method = preflight.small(stage, Encoder(recipe.encoder.model_dump(), recipe.dataset.image_size), classes)
    found = {name: tuple(tensor.shape) for name, tensor in method.state_dict().items()}
    for table, state in method.tables.items():
        found |= {f"{table}/{name}": tuple(tensor.shape) for name, tensor in state.state_dict().items()}
    return found


def _told(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else " x ".join(map(str, shape)) or "a number"
