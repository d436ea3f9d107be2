"""Ray Tune's components of a search, without Ray: which trials they give, stop and report."""

import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from firstlight.pipeline.config.stages import TrainingLength
from firstlight.pipeline.search.ledger import Trial
from firstlight.pipeline.search.tune import (
    CooperativeAsha,
    LedgerSearcher,
    ReportCallback,
    StopOnRequest,
    make_scheduler,
)
from firstlight.pipeline.train.loop import STOP_FILE
from tests.support.searches import LR, done_trial, make_search

ASHA: dict[str, Any] = {"objectives": [{"measure": "pretrain.watch_rankme"}], "scheduler": "asha"}


class ListedTrials:
    """A source of trials that remembers what it is told."""

    def __init__(self, count: int, folder: Path, more: bool = False) -> None:
        self.trials, self.folder, self.more = [Trial(k, {LR: 0.1}) for k in range(count)], folder, more
        self.reports: list[tuple[int, dict[str, Any]]] = []
        self.ends: list[tuple[int, str]] = []

    def begin_trial(self) -> tuple[Trial, Path] | None:
        return (self.trials[0], self.folder / self.trials.pop(0).name) if self.trials else None

    def has_more(self) -> bool:
        return self.more

    def receive_report(self, trial: Trial, report: dict[str, Any]) -> None:
        self.reports.append((trial.number, report))

    def end_trial(self, trial: Trial, error: str) -> None:
        self.ends.append((trial.number, error))


def test_searcher_gives_trials_in_order_and_then_finishes(tmp_path: Path) -> None:
    searcher = LedgerSearcher(ListedTrials(2, tmp_path), threading.Event())
    assert [searcher.suggest(name) for name in "ab"] == [{"folder": str(tmp_path / name)} for name in ("000", "001")]
    assert searcher.suggest("c") == Searcher.FINISHED


def test_searcher_waits_while_a_population_is_paused(tmp_path: Path) -> None:
    stopped = threading.Event()
    searcher = LedgerSearcher(ListedTrials(0, tmp_path, more=True), stopped)
    assert searcher.suggest("a") is None
    stopped.set()
    assert searcher.suggest("a") == Searcher.FINISHED


def test_reports_and_ends_reach_the_source(tmp_path: Path) -> None:
    source = ListedTrials(2, tmp_path)
    searcher = LedgerSearcher(source, threading.Event())
    callback = ReportCallback(searcher)
    searcher.suggest("a")
    searcher.suggest("b")
    callback.on_trial_result(1, [], SimpleNamespace(trial_id="b"), {"progress": 0.5})
    searcher.on_trial_complete("a", {})
    searcher.on_trial_complete("a", {})
    searcher.on_trial_complete("b", error=True)
    callback.on_trial_error(1, [], SimpleNamespace(trial_id="b", get_error=lambda: "ActorDiedError"))
    callback.on_trial_result(1, [], SimpleNamespace(trial_id="b"), {"progress": 0.6})
    assert source.reports == [(1, {"progress": 0.5})]
    assert source.ends == [(0, ""), (1, "ActorDiedError")], "each trial ends once"


def test_trials_do_not_end_after_a_stop(tmp_path: Path) -> None:
    source, stopped = ListedTrials(1, tmp_path), threading.Event()
    searcher, stopper = LedgerSearcher(source, stopped), StopOnRequest(stopped)
    searcher.suggest("a")
    assert not stopper.stop_all()
    stopped.set()
    searcher.on_trial_complete("a", {})
    ReportCallback(searcher).on_trial_error(1, [], SimpleNamespace(trial_id="a", get_error=lambda: "killed"))
    assert stopper.stop_all()
    assert source.ends == []


def test_scheduler_is_asha_only_if_asked_for() -> None:
    """Every scheduler of Tune is also one that runs trials in their order."""
    assert type(make_scheduler(make_search(**ASHA), [], TrainingLength(9, "epochs"))) is CooperativeAsha
    assert type(make_scheduler(make_search(), [], TrainingLength(9, "epochs"))) is FIFOScheduler


def new_trial(scheduler: Any) -> Any:
    trial = SimpleNamespace(trial_id="new")
    scheduler.on_trial_add(None, trial)
    return trial


def make_report(training: Path, **changes: Any) -> dict[str, Any]:
    training.mkdir(exist_ok=True)
    report = {"trained": 1.0, "unit": "epochs", "value": 0.1, "so_far": "watch_rankme 0.1"}
    return {**report, "training": str(training), "last": False, **changes}


EARLIER = [done_trial(k, {}, 0.5, seen=[(1.0, value), (3.0, value)]) for k, value in enumerate((0.9, 0.8, 0.7))]


@pytest.mark.parametrize(("earlier", "stops"), [(EARLIER, True), ([], False)])
def test_asha_asks_the_worst_trial_to_stop(tmp_path: Path, earlier: Sequence[Trial], stops: bool) -> None:
    """The trial is the worst of those that reached the first rung, also if the others did in an earlier command."""
    scheduler = make_scheduler(make_search(**ASHA), earlier, TrainingLength(9, "epochs"))
    trial: Any = new_trial(scheduler)
    report = make_report(tmp_path / "training")
    decision = scheduler.on_trial_result(None, trial, report)  # type: ignore[arg-type]
    assert decision == "CONTINUE", "Tune ends no process"
    assert (tmp_path / "training" / STOP_FILE).exists() == stops


def test_asha_keeps_the_first_reason(tmp_path: Path) -> None:
    scheduler: Any = make_scheduler(make_search(**ASHA), EARLIER, TrainingLength(9, "epochs"))
    trial = new_trial(scheduler)
    scheduler.on_trial_result(None, trial, make_report(tmp_path / "training"))
    later = make_report(tmp_path / "training", trained=3.0, so_far="until it stops")
    assert scheduler.on_trial_result(None, trial, later) == "CONTINUE"
    assert (tmp_path / "training" / STOP_FILE).read_text() == "behind others at 1 epochs: watch_rankme 0.1"


def test_asha_counts_the_steps_of_a_training_in_steps(tmp_path: Path) -> None:
    """The rungs are at 500 and 1,500 steps; nobody is judged before."""
    earlier = [done_trial(k, {}, 0.5, seen=[(1500, value)]) for k, value in enumerate((0.9, 0.8, 0.7))]
    search = make_search(**{**ASHA, "scheduler": {"name": "asha", "grace": 500}})
    scheduler: Any = make_scheduler(search, earlier, TrainingLength(4000, "steps"))
    trial, folder = new_trial(scheduler), tmp_path / "training"
    scheduler.on_trial_result(None, trial, make_report(folder, trained=490, unit="steps"))
    assert not (folder / STOP_FILE).exists()
    scheduler.on_trial_result(None, trial, make_report(folder, trained=1510, unit="steps"))
    assert (folder / STOP_FILE).read_text() == "behind others at 1,510 steps: watch_rankme 0.1"


def test_asha_does_not_stop_a_training_at_its_end(tmp_path: Path) -> None:
    scheduler: Any = make_scheduler(make_search(**ASHA), EARLIER, TrainingLength(9, "epochs"))
    scheduler.on_trial_result(None, new_trial(scheduler), make_report(tmp_path / "training", last=True))
    assert not (tmp_path / "training" / STOP_FILE).exists()
