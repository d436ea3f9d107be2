"""Ray Tune: gives each trial of a search a process, and decides which of them to stop. Tune keeps nothing that is ever read again: what a search
knows is in its ledger."""

import logging
import os
import shutil
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.run.launch import interruptible
from firstlight.pipeline.run.ray_session import verbose
from firstlight.pipeline.search.ledger import Trial
from firstlight.pipeline.search.space import Asha, Search
from firstlight.pipeline.search.trial import drive
from firstlight.pipeline.train.loop import STOP

ENVIRONMENT = {  # read by Ray
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints a banner however quiet it is told to be
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of a recipe are the driver's
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # not every report has what the scheduler decides by
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_WARN_THRESHOLD_S": "30",
}


class Trials(Protocol):
    """Where trials come from, and where it is told what becomes of them; all in one thread."""

    def begin(self) -> tuple[Trial, Path] | None:
        """The next trial, or the next part of one, and its folder; None: there is none now."""
        ...

    def more(self) -> bool:
        """Whether there will be more, when there is none now."""
        ...

    def told(self, trial: Trial, report: dict[str, Any]) -> None:
        """What a trial has reported of its progress."""
        ...

    def ended(self, trial: Trial, error: str) -> None:
        """`error`: what Ray knows of a process that has died, or ""."""
        ...


@dataclass(frozen=True)
class Room:
    """Trials at a time, what Ray reserves for the process of each, and how often one that dies (with its machine, say) goes on in another."""

    at_once: int
    resources: dict[str, float]
    deaths: int


def run_trials(trials: Trials, scheduler: TrialScheduler, left: int, room: Room, folder: Path) -> None:
    """Run the `left` trials, or parts of trials, that there are to come. Tune's own files are below `folder`, which is removed."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    logging.getLogger("ray.tune").setLevel(logging.INFO if verbose() else logging.CRITICAL)
    stopped = threading.Event()
    handout = Handout(trials, stopped)
    config = tune.TuneConfig(
        search_alg=handout, scheduler=scheduler, num_samples=left, max_concurrent_trials=room.at_once, reuse_actors=True
    )
    watching: list[tune.Callback] = [Progress(handout)]
    patience = tune.FailureConfig(
        max_failures=room.deaths
    )  # what goes wrong in a trial it tells itself: only its process can fail
    run_config = tune.RunConfig(
        name=uuid.uuid4().hex[:8],
        storage_path=str(folder),
        verbose=0,
        stop=Ended(stopped),
        callbacks=watching,
        failure_config=patience,
    )
    tuner = tune.Tuner(tune.with_resources(drive, room.resources), tune_config=config, run_config=run_config)
    try:
        interruptible(tuner.fit, stopped.set)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _NotKept:
    """Tune writes its parts to files, for a restore that a search never does: nothing of these goes there."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Handout(_NotKept, Searcher):  # type: ignore[misc]
    """Gives Tune the trials in their order."""

    def __init__(self, trials: Trials, stopped: threading.Event) -> None:
        super().__init__()
        self.trials, self.stopped = trials, stopped
        self.mine: dict[str, Trial] = {}  # by Tune's id

    def suggest(self, trial_id: str) -> Any:
        begun = None if self.stopped.is_set() else self.trials.begin()
        if begun is None:
            return None if not self.stopped.is_set() and self.trials.more() else Searcher.FINISHED
        self.mine[trial_id], folder = begun
        return {"folder": str(folder)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Of one that has died, `Progress` tells."""
        if not error and not self.stopped.is_set() and trial_id in self.mine:
            self.trials.ended(self.mine.pop(trial_id), "")

    def save(self, checkpoint_path: str) -> None:
        """Nothing."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError


class Progress(_NotKept, tune.Callback):  # type: ignore[misc]
    """What trials report, and which have died."""

    def __init__(self, handout: Handout) -> None:
        self.handout = handout

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if trial.trial_id in self.handout.mine:
            self.handout.trials.told(self.handout.mine[trial.trial_id], result)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        mine = self.handout.mine.pop(trial.trial_id, None)
        if mine is not None and not self.handout.stopped.is_set():
            self.handout.trials.ended(mine, str(trial.get_error() or "unknown"))


class Ended(_NotKept, Stopper):  # type: ignore[misc]
    """Ends all trials when the search is stopped."""

    def __init__(self, stopped: threading.Event) -> None:
        self.stopped = stopped

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.stopped.is_set()


class Halving(_NotKept, AsyncHyperBandScheduler):  # type: ignore[misc]
    """ASHA, which asks a trial to stop instead of ending its process: the training stops after the step it is at, on all its workers, and its
    trainer, placement group and MLflow run are closed by those that opened them."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "training" in result and (Path(result["training"]) / STOP).exists():
            return str(
                TrialScheduler.CONTINUE
            )  # it was asked already: what it reports until it stops counts for nothing
        action = super().on_trial_result(tune_controller, trial, result)
        if action == TrialScheduler.STOP and not result["last"]:
            why = f"behind others at {result['epochs']:.3g} epochs: {result['so_far']}"
            write_atomically(Path(result["training"]) / STOP, why.encode())
        return str(TrialScheduler.CONTINUE)

    def recall(self, before: Sequence[Trial]) -> None:
        """Know what the trials of an earlier command have reached."""
        for trial in before:
            stub: Any = SimpleNamespace(trial_id=f"before-{trial.number}")
            self.on_trial_add(None, stub)  # type: ignore[arg-type]
            for epochs, value in trial.seen:
                super().on_trial_result(None, stub, {"epochs": epochs, "value": value})  # type: ignore[arg-type]


def scheduler(search: Search, before: Sequence[Trial], max_epochs: int) -> TrialScheduler:
    """`before`: the trials that have ended. `max_epochs`: of the training that is decided upon, at most."""
    if not isinstance(search.scheduler, Asha) or search.deciding is None:
        return FIFOScheduler()
    made = Halving(
        time_attr="epochs",
        metric="value",
        mode=search.deciding[1],
        grace_period=min(search.scheduler.grace, max_epochs),
        max_t=max_epochs,
        reduction_factor=search.scheduler.reduction,
        stop_last_trials=False,
    )
    made.recall(before)
    return made
