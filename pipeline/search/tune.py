"""Ray Tune: gives each trial of a search a process, and decides which trials to stop.

Nothing that Tune writes is read again: what a search knows is in its ledger.
"""

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

from firstlight.pipeline.config.stages import TrainingLength
from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.run.launch import run_interruptibly
from firstlight.pipeline.run.ray_session import is_verbose
from firstlight.pipeline.search.ledger import Trial
from firstlight.pipeline.search.space import Asha, Search
from firstlight.pipeline.search.trial import run_trial
from firstlight.pipeline.train.loop import STOP_FILE

# Ray reads these.
TUNE_ENVIRONMENT = {
    # Otherwise Tune prints a banner, also with `verbose=0`.
    "RAY_AIR_NEW_OUTPUT": "0",
    # Relative paths of a recipe refer to the driver's working directory.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The number that the scheduler decides by is not in every report.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_WARN_THRESHOLD_S": "30",
}


class TrialSource(Protocol):
    """Provides the trials, and is informed of their progress and end. All calls come from one thread."""

    def begin_trial(self) -> tuple[Trial, Path] | None:
        """Returns the next trial, or the next segment of one, and its folder; None if no trial can begin now."""
        ...

    def has_more(self) -> bool:
        """Returns True if another trial will begin later although none can begin now."""
        ...

    def receive_report(self, trial: Trial, report: dict[str, Any]) -> None:
        """Receives a report of a trial's progress."""
        ...

    def end_trial(self, trial: Trial, error: str) -> None:
        """Takes note that the process of a trial has ended. `error`: Ray's error if the process died, otherwise ""."""
        ...


@dataclass(frozen=True)
class TrialLimits:
    """The number of trials at a time, and the resources and restarts of each."""

    max_concurrent: int
    # The resources that Ray reserves for the process of each trial.
    resources: dict[str, float]
    # The number of times that a trial whose process dies, for example with its machine, resumes in another process.
    max_failures: int


def run_trials(
    source: TrialSource, scheduler: TrialScheduler, num_samples: int, limits: TrialLimits, folder: Path
) -> None:
    """Runs the trials that `source` provides, at most `num_samples` times.

    Tune's own files are written to `folder`, which is removed at the end.
    """
    for key, value in TUNE_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    logging.getLogger("ray.tune").setLevel(logging.INFO if is_verbose() else logging.CRITICAL)
    stopped = threading.Event()
    searcher = LedgerSearcher(source, stopped)
    config = tune.TuneConfig(
        search_alg=searcher,
        scheduler=scheduler,
        num_samples=num_samples,
        max_concurrent_trials=limits.max_concurrent,
        reuse_actors=True,
    )
    run_config = tune.RunConfig(
        name=uuid.uuid4().hex[:8],
        storage_path=str(folder),
        verbose=0,
        # Tune would take a reporter that clears the cell in a notebook, also with `verbose=0`.
        progress_reporter=tune.CLIReporter(),
        stop=StopOnRequest(stopped),
        callbacks=[ReportCallback(searcher)],
        # A trial reports its errors as its outcome: for Tune, it can only fail by the death of its process.
        failure_config=tune.FailureConfig(max_failures=limits.max_failures),
    )
    trainable = tune.with_resources(_run_trial_on_tune, limits.resources)
    tuner = tune.Tuner(trainable, tune_config=config, run_config=run_config)
    try:
        run_interruptibly(tuner.fit, stopped.set)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_trial_on_tune(config: dict[str, Any]) -> dict[str, Any]:
    return run_trial(Path(config["folder"]), tune.report)


class _WithoutState:
    """Keeps the state of Tune's components out of the files that Tune writes for a restore. A search never restores."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class LedgerSearcher(_WithoutState, Searcher):  # type: ignore[misc]
    """Gives Tune the trials of a search in their order."""

    def __init__(self, source: TrialSource, stopped: threading.Event) -> None:
        super().__init__()
        self.source, self.stopped = source, stopped
        # The running trials by Tune's id.
        self.running: dict[str, Trial] = {}

    def suggest(self, trial_id: str) -> Any:
        """Returns the config of the next trial: its folder. Returns None if Tune is to ask again later."""
        begun = None if self.stopped.is_set() else self.source.begin_trial()
        if begun is None:
            return None if not self.stopped.is_set() and self.source.has_more() else Searcher.FINISHED
        self.running[trial_id], folder = begun
        return {"folder": str(folder)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Handles the trials that ended. `ReportCallback.on_trial_error` handles those whose process died."""
        if not error and not self.stopped.is_set() and trial_id in self.running:
            self.source.end_trial(self.running.pop(trial_id), "")

    def save(self, checkpoint_path: str) -> None:
        """Writes nothing."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError


class ReportCallback(_WithoutState, tune.Callback):  # type: ignore[misc]
    """Forwards reports and failures of trials to the search."""

    def __init__(self, searcher: LedgerSearcher) -> None:
        self.searcher = searcher

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if trial.trial_id in self.searcher.running:
            self.searcher.source.receive_report(self.searcher.running[trial.trial_id], result)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        failed = self.searcher.running.pop(trial.trial_id, None)
        if failed is not None and not self.searcher.stopped.is_set():
            self.searcher.source.end_trial(failed, str(trial.get_error() or "unknown"))


class StopOnRequest(_WithoutState, Stopper):  # type: ignore[misc]
    """Ends all trials when the search is stopped."""

    def __init__(self, stopped: threading.Event) -> None:
        self.stopped = stopped

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.stopped.is_set()


class CooperativeAsha(_WithoutState, AsyncHyperBandScheduler):  # type: ignore[misc]
    """ASHA that asks a trial to stop instead of killing its process.

    The training stops after its current step, on all its workers. Its trainer, placement group and MLflow run are then
    closed by the code that opened them.
    """

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Writes the stop file of a training if ASHA decides to stop its trial. Always tells Tune to continue."""
        # A trial that was asked to stop must not affect the others by what it reports until it has stopped.
        if "training" in result and (Path(result["training"]) / STOP_FILE).exists():
            return str(TrialScheduler.CONTINUE)
        action = super().on_trial_result(tune_controller, trial, result)
        if action == TrialScheduler.STOP and not result["last"]:
            reason = f"behind others at {_format_length(result['trained'])} {result['unit']}: {result['so_far']}"
            write_atomically(Path(result["training"]) / STOP_FILE, reason.encode())
        return str(TrialScheduler.CONTINUE)

    def replay_trials(self, trials: Sequence[Trial]) -> None:
        """Takes into account what the trials of an earlier command have reached."""
        for trial in trials:
            stub: Any = SimpleNamespace(trial_id=f"before-{trial.number}")
            self.on_trial_add(None, stub)  # type: ignore[arg-type]
            for trained, value in trial.seen:
                super().on_trial_result(None, stub, {"trained": trained, "value": value})  # type: ignore[arg-type]


def _format_length(count: float) -> str:
    """Returns a number of epochs, which may be a fraction, or of steps."""
    return f"{count:.3g}" if count < 1000 else f"{count:,.0f}"


def make_scheduler(search: Search, ended: Sequence[Trial], longest: TrainingLength) -> TrialScheduler:
    """Builds the scheduler of a search.

    `ended`: the trials that have ended before. `longest`: the maximum length of the training that the scheduler
    monitors; it counts in its unit.
    """
    if not isinstance(search.scheduler, Asha) or search.scheduler_objective is None:
        return FIFOScheduler()
    asha = CooperativeAsha(
        time_attr="trained",
        metric="value",
        mode=search.scheduler_objective[1],
        grace_period=min(search.scheduler.grace, longest.count),
        max_t=longest.count,
        reduction_factor=search.scheduler.reduction,
        stop_last_trials=False,
    )
    asha.replay_trials(ended)
    return asha
