"""The MLflow runs of a search: its own run, a child run for each trial, and below each trial the runs of its stages."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.errors import one_line
from firstlight.pipeline.run.given_weights import WEIGHTS_KEY
from firstlight.pipeline.search.ledger import SearchState, Trial
from firstlight.pipeline.search.plan import SearchPlan
from firstlight.pipeline.stages.artifacts.weights_origin import TRACKED_PREFIXES
from firstlight.pipeline.stages.code_version import code_version
from firstlight.pipeline.tracking.client import DESCRIPTION_TAG, TrackingClient
from firstlight.pipeline.tracking.figures import list_figures
from firstlight.pipeline.tracking.metric_keys import sanitize_metric_key
from firstlight.pipeline.tracking.references import pin_reference
from firstlight.pipeline.tracking.run_file import RUN_FILE, read_run_id

MLFLOW_STATUS = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class SearchRuns:
    """Writes the runs of a search and its trials. Only the process of the search uses it.

    The runs of a trial's stages are written by the process of the trial.

    Raises:
        UserError: as `TrackingClient`.
    """

    def __init__(self, plan: SearchPlan, recipe: Recipe, folder: Path) -> None:
        self.plan, self.folder, self.tracking = plan, folder, TrackingClient(recipe)
        self.client = self.tracking.client
        search = plan.search
        self.tags = {
            "firstlight.kind": "search",
            "firstlight.recipe": recipe.name,
            DESCRIPTION_TAG: search.description,
        }
        params = {
            **{
                f"space.{key}": json.dumps(d.model_dump(mode="json", exclude_none=True))
                for key, d in search.space.items()
            },
            "algorithm": search.algorithm,
            "scheduler": search.scheduler.name,
            "seed": str(search.seed),
            "fingerprint": folder.name,
            **{f"objective{k}": f"{o.mode} {o.measure}" for k, o in enumerate(search.objectives)},
            "code": code_version(),
        }
        self.run_id = self.tracking.start_run(search.name, folder / RUN_FILE, params, self.tags)
        self.client.log_dict(self.run_id, search.model_dump(mode="json"), "search.json")
        # The calls that MLflow has refused. They are tried again at the end.
        self.unpublished: list[Callable[[], None]] = []

    def trial_tags(self, trial: Trial) -> dict[str, str]:
        return {"mlflow.parentRunId": self.run_id, "firstlight.kind": "trial", "firstlight.trial": str(trial.number)}

    def start_trial_run(self, trial: Trial, folder: Path) -> None:
        """Starts the run of a trial. A trial that resumes has the same run as before."""
        folder.mkdir(parents=True, exist_ok=True)
        values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in trial.values.items()}
        params = {**values, "code": trial.code}
        self.tracking.start_run(f"trial {trial.name}", folder / RUN_FILE, params, self.trial_tags(trial))

    def publish_trial(self, trial: Trial, folder: Path, best: float | None) -> None:
        """Logs the scores and the state of a trial that ended, and the best score of the first objective so far.

        If MLflow is unreachable, this is repeated at the end.
        """
        self.try_publish(lambda: self._log_trial_end(trial, folder, best))

    def log_segment(self, trial: Trial, folder: Path) -> None:
        """Logs the value that a trial of a population reached in its last segment, and its numeric settings."""
        segment, objective = trial.parts[-1], self.plan.search.scheduler_objective
        assert objective is not None
        numbers = {f"space.{key}": float(v) for key, v in segment.values.items() if isinstance(v, int | float)}
        row = {"step": segment.end, "time": trial.ended, sanitize_metric_key(objective[0]): segment.value, **numbers}
        self.tracking.log_metrics(_get_run_id(folder), [row])

    def close_replaced_training(self, folder: Path) -> None:
        """Closes the run of the training that a trial does not continue because it copied another one."""
        self._close_child_runs(_get_run_id(folder), "KILLED")

    def try_publish(self, write: Callable[[], None]) -> None:
        """Calls `write`. If it fails, `flush_unpublished` calls it again."""
        try:
            write()
        # A server can answer with any error.
        except Exception:
            self.unpublished.append(write)

    def flush_unpublished(self) -> str | None:
        """Tries again what MLflow has refused. Returns the last error, None if MLflow has everything."""
        waiting, self.unpublished = self.unpublished, []
        reason = None
        for write in waiting:
            try:
                write()
            except Exception as error:
                self.unpublished.append(write)
                reason = one_line(error, 160) or type(error).__name__
        return reason

    def _log_trial_end(self, trial: Trial, folder: Path, best: float | None) -> None:
        run_id = _get_run_id(folder)
        self.client.set_tag(run_id, "firstlight.state", trial.state)
        if trial.reason:
            self.client.set_tag(run_id, "firstlight.reason", trial.reason)
        keys = [sanitize_metric_key(objective.measure) for objective in self.plan.search.objectives]
        means = dict(zip(keys, trial.means, strict=False))
        self.tracking.log_results(run_id, {**means, "seconds": trial.seconds})
        for key, by_seed in zip(keys, trial.scores, strict=False):
            if len(by_seed) > 1:
                self.tracking.log_results(run_id, {f"{key}/{k}": score for k, score in enumerate(by_seed)})
        self._close_child_runs(run_id, MLFLOW_STATUS[trial.state])
        self.tracking.finish_run(run_id, MLFLOW_STATUS[trial.state])
        row = {"step": trial.number, "time": trial.ended, **means}
        self.tracking.log_metrics(self.run_id, [{**row, "best": best} if best is not None and means else row])

    def _close_child_runs(self, run_id: str, status: str) -> None:
        """Closes the runs of stages that a killed process has left open."""
        children = f"tags.`mlflow.parentRunId` = '{run_id}' and attributes.status = 'RUNNING'"
        for run in self.client.search_runs([self.tracking.experiment_id], children):
            self.tracking.finish_run(run.info.run_id, status)

    def finish_search(self, report: Path | None, table: list[dict[str, Any]]) -> None:
        """Logs the figures, the report and the table of trials, and ends the run of the search."""
        for file, entry in list_figures(self.folder):
            self.tracking.log_figure(self.run_id, file, entry.title)
        if report is not None:
            self.client.log_artifact(self.run_id, str(report))
        self.client.log_dict(self.run_id, {"trials": table}, "trials.json")
        self.tracking.finish_run(self.run_id)

    def tag_best_trial(self, trial: Trial, promoted: str | None) -> None:
        self.client.set_tag(self.run_id, "firstlight.best", str(trial.number))
        if promoted:
            self.client.set_tag(self.run_id, "firstlight.promoted", promoted)

    def close_open_runs(self, state: SearchState | None, status: str) -> None:
        """Closes all runs that are open, as KILLED or FAILED. The next command opens them again."""
        # MLflow may be what failed: the first error is the one that the user should see.
        for trial in state.trials_in("running") if state else ():
            with contextlib.suppress(Exception):
                run_id = _get_run_id(state.trial_folder(trial))  # type: ignore[union-attr]
                self._close_child_runs(run_id, status)
                self.tracking.finish_run(run_id, status)
        with contextlib.suppress(Exception):
            self.tracking.finish_run(self.run_id, status)

    def pin_references(self, recipe: Recipe) -> dict[str, str]:
        """Returns, by stage or `encoder.weights`, the versions of the encoders that the recipe names by alias.

        An alias that moves must not change a search that has begun.

        Raises:
            UserError: no such model exists.
        """
        sources = {name: recipe.encoder_source(name) for name in recipe.stages}
        pinned = {
            name: pin_reference(self.tracking, source.reference, f"stages.{name}.encoder")
            for name, source in sources.items()
            if source and source.reference
        }
        if recipe.takes_given and recipe.encoder.weights.startswith(TRACKED_PREFIXES):
            pinned[WEIGHTS_KEY] = pin_reference(self.tracking, recipe.encoder.weights, WEIGHTS_KEY)
        return pinned


def _get_run_id(folder: Path) -> str:
    run_id = read_run_id(folder)
    assert run_id is not None, "a trial's run is started before the trial"
    return run_id
