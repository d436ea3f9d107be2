"""The MLflow runs of a search: a trial keeps its run, and what MLflow refuses is published later."""

from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.search.ledger import SearchState, Segment, Trial
from firstlight.pipeline.search.runs import SearchRuns
from firstlight.pipeline.tracking.run_file import RUN_FILE, read_run_id
from tests.support.searches import LR, PERIOD, done_trial, make_plan

PBT: dict[str, Any] = {"name": "pbt", "measure": "pretrain.loss", "mode": "min", "interval": 1}


def make_runs(tmp_path: Path, **changes: Any) -> SearchRuns:
    plan = make_plan(tmp_path, **changes)
    return SearchRuns(plan, plan.budget_recipe(), tmp_path / "search")


def test_resumed_trial_has_the_same_run(tmp_path: Path) -> None:
    runs, trial, folder = make_runs(tmp_path), Trial(3, {LR: 0.25, PERIOD: 2}), tmp_path / "trial"
    runs.start_trial_run(trial, folder)
    first = read_run_id(folder)
    runs.start_trial_run(trial, folder)
    assert read_run_id(folder) == first
    run = runs.client.get_run(str(first))
    assert (run.data.params[LR], run.data.params[PERIOD]) == ("0.25", "2")
    assert run.data.tags["firstlight.trial"] == "3"
    assert run.data.tags["mlflow.parentRunId"] == runs.run_id


def test_ended_trial_has_its_scores_and_those_of_each_seed(tmp_path: Path) -> None:
    runs, folder = make_runs(tmp_path), tmp_path / "trial"
    trial = done_trial(0, {LR: 0.25, PERIOD: 2}, 0.5, seeds=2)
    runs.start_trial_run(trial, folder)
    runs.publish_trial(trial, folder, best=0.75)
    run = runs.client.get_run(str(read_run_id(folder)))
    assert run.info.status == "FINISHED"
    scores = {key: value for key, value in run.data.metrics.items() if key.startswith("evaluate.knn")}
    assert scores == pytest.approx({"evaluate.knn": 0.505, "evaluate.knn/0": 0.5, "evaluate.knn/1": 0.51})
    assert runs.client.get_run(runs.run_id).data.metrics["best"] == 0.75


def test_refused_writes_are_repeated_until_mlflow_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, folder, trial = make_runs(tmp_path), tmp_path / "trial", done_trial(0, {LR: 0.25, PERIOD: 2}, 0.5)
    runs.start_trial_run(trial, folder)

    def refuse(*arguments: Any) -> None:
        raise ConnectionError("connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(runs.tracking, "log_results", refuse)
        runs.publish_trial(trial, folder, best=None)
        assert runs.flush_unpublished() == "connection refused"
    assert "evaluate.knn" not in runs.client.get_run(str(read_run_id(folder))).data.metrics
    assert runs.flush_unpublished() is None
    assert runs.client.get_run(str(read_run_id(folder))).data.metrics["evaluate.knn"] == 0.5


def test_segment_of_a_population_logs_its_value_and_settings(tmp_path: Path) -> None:
    runs, folder = make_runs(tmp_path, algorithm="random", scheduler=PBT), tmp_path / "trial"
    trial = Trial(0, {LR: 0.25, PERIOD: 2}, parts=[Segment(1, {LR: 0.125, PERIOD: 2}, 0.5, None)], ended=1000.0)
    runs.start_trial_run(trial, folder)
    runs.log_segment(trial, folder)
    metrics = runs.client.get_run(str(read_run_id(folder))).data.metrics
    assert metrics == {"pretrain.loss": 0.5, f"space.{LR}": 0.125, f"space.{PERIOD}": 2.0}


def test_stopped_search_closes_the_runs_of_its_trials(tmp_path: Path) -> None:
    runs, state = make_runs(tmp_path), SearchState(tmp_path / "search", "store")
    state.trials = [Trial(0, {LR: 0.25, PERIOD: 2})]
    folder = state.trial_folder(state.trials[0])
    runs.start_trial_run(state.trials[0], folder)
    runs.close_open_runs(state, "KILLED")
    ids = [str(read_run_id(folder)), runs.run_id]
    assert [runs.client.get_run(run_id).info.status for run_id in ids] == ["KILLED", "KILLED"]
    assert (folder / RUN_FILE).exists(), "the next command opens the same run"
