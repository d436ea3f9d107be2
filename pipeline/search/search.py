"""A search: Ray Tune runs trials of a recipe with different settings, which are compared on held-out images.

A search that was stopped resumes. Its files:
runs/<name>/<fingerprint>/
    ledger.json        every trial: its settings, state and scores
    trials/000/        the files of a trial, as of a run of a recipe (see `firstlight.pipeline.search.trial`)
    best/              the files of the recipe's run with the best setting, if `retrain` is true
    report.html        the report; recipe.yaml and search.yaml repeat the search
"""

import contextlib
import shutil
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.sources import Source
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import StageFailed, UserError, one_line
from firstlight.pipeline.files import exclusive_lock
from firstlight.pipeline.records import DamagedRecord
from firstlight.pipeline.report.page_parts import describe_error
from firstlight.pipeline.run import nodes, preflight
from firstlight.pipeline.run.auto_scale import resolve_scale
from firstlight.pipeline.run.publishing import ParentRun
from firstlight.pipeline.run.ray_session import RaySession
from firstlight.pipeline.run.runner import prepare_store, run_recipe
from firstlight.pipeline.search import pbt
from firstlight.pipeline.search.capacity import driver_resources, max_concurrent_trials
from firstlight.pipeline.search.checks import check_search, check_search_images
from firstlight.pipeline.search.ledger import (
    LEDGER_ADVICE,
    OTHER_CODE_NOTE,
    SearchState,
    Trial,
    find_best_trial,
)
from firstlight.pipeline.search.objectives import score_range
from firstlight.pipeline.search.plan import SearchPlan
from firstlight.pipeline.search.progress import TrialTable
from firstlight.pipeline.search.report import write_search_report
from firstlight.pipeline.search.report_blocks import BEST_FOLDER, SearchReport
from firstlight.pipeline.search.runs import SearchRuns
from firstlight.pipeline.search.sampler import propose_values
from firstlight.pipeline.search.space import Pbt
from firstlight.pipeline.search.trial import TrialRequest, explain_death, write_trial_file
from firstlight.pipeline.stages.score_rows import ScoreRow
from firstlight.pipeline.tracking.run_file import read_run_id


@dataclass(frozen=True)
class SearchResult:
    """The trials of a search and the best of them."""

    trials: list[Trial]
    best: Trial
    # models:/<name>@<alias> of the encoder of the best trial, None if it was not promoted.
    promoted: str | None
    # The recipe with the best setting, and the rows of its table; None and () unless the search has `retrain`.
    retrained: Recipe | None = None
    rows: tuple[ScoreRow, ...] = ()
    report: Path | None = None


def run_search(plan: SearchPlan, console: Console) -> SearchResult:
    """Runs what has not been done yet of a search.

    Raises:
        UserError: a mistake that the user can correct; found before Ray starts where possible.
        StageFailed, StopTraining: all trials have failed, or the run of the recipe with the best setting has.
    """
    resolved, chosen = resolve_scale(plan.trial_recipe(plan.corner_values()[0]))
    if chosen:
        console.print(chosen, highlight=False, markup=False, soft_wrap=True)
    plan = plan.at_scale(resolved.scale)
    recipe = plan.trial_recipe(plan.corner_values()[0])
    source = check_search(plan, recipe)
    folder = recipe.storage.resolve() / plan.search.name / plan.fingerprint()
    with exclusive_lock(folder, plan.search.name):
        runs, runner = SearchRuns(plan, recipe, folder), None
        try:
            with RaySession(recipe.scale, recipe.stream, console.print) as session:
                store = prepare_store(recipe, session, console, ParentRun(folder, runs.tags))
                check_search_images(plan, store)
                ranges = [score_range(objective.measure, recipe) for objective in plan.search.objectives]
                runner = SearchRunner(plan, SearchState(folder, store.hash, ranges), runs, (source, store), console)
                runner.run_remaining(session)
                return runner.finish_search()
        except BaseException as error:
            if runner:
                runner.write_partial_report(error)
            is_stopped = isinstance(error, KeyboardInterrupt)
            runs.close_open_runs(runner.state if runner else None, "KILLED" if is_stopped else "FAILED")
            raise


class SearchRunner:
    """Runs the trials of one `firstlight search`. It is the `TrialSource` of Ray Tune."""

    def __init__(
        self, plan: SearchPlan, state: SearchState, runs: SearchRuns, images: tuple[Source, Store], console: Console
    ) -> None:
        self.plan, self.state, self.runs, self.console = plan, state, runs, console
        self.source, self.store = images
        self.table = TrialTable(console, plan.search)
        # Why no more trials can begin.
        self.start_error: UserError | None = None
        self._restore_trials()

    def _restore_trials(self) -> None:
        """Takes over the trials of earlier commands, also those that ended after the command was killed."""
        state = self.state
        for trial in state.trials:
            if trial.values.keys() != self.plan.search.space.keys():
                keys = f"has the settings {', '.join(trial.values)}"
                raise DamagedRecord(f"{state.file}: is damaged: trial {trial.number} {keys}; {LEDGER_ADVICE}")
        if not state.trials:
            state.references = self.runs.pin_references(self.plan.budget_recipe())
            state.save()
        for trial in state.trials:
            if trial.again:
                state.reopen_trial(trial)
        for trial in state.trials_in("running"):
            if not trial.resting and state.load_outcome(trial):
                self._record_end(trial)
        # Trials that have begun and resume.
        self.waiting = [trial for trial in state.trials_in("running") if not trial.resting]
        for trial in state.trials:
            self.table.add_trial(trial)
        self._print_earlier_trials()

    def _print_earlier_trials(self) -> None:
        for line in self.plan.list_warnings():
            self.table.print_note(line)
        running = len(self.state.trials_in("running"))
        ended = len(self.state.trials) - running
        if ended or running:
            self.table.print_note(f"{ended} trials have ended before, {running} resume where they were stopped")
        if self.state.has_other_code():
            self.table.print_note(OTHER_CODE_NOTE)

    def run_remaining(self, session: RaySession) -> None:
        """Runs all trials that have not ended.

        Raises:
            UserError: a trial could not begin.
        """
        ended = self.state.trials_in("done", "stopped", "failed")
        left = self.plan.search.num_trials - len(ended)
        if left <= 0:
            return
        # The import stands here because it imports Ray.
        from firstlight.pipeline.search import tune

        session.start(always=True)
        recipe = self.plan.trial_recipe(self.plan.corner_values()[0])
        concurrent = max_concurrent_trials(
            recipe.scale, recipe.stream, nodes.list_live_nodes(), self.plan.search.concurrency
        )
        scheduler = tune.make_scheduler(self.plan.search, ended, self.plan.max_length)
        limits = tune.TrialLimits(concurrent, driver_resources(recipe.scale), recipe.scale.max_failures)
        with self.table:
            self.table.print_start(left, concurrent)
            tune.run_trials(
                self, scheduler, left * pbt.max_segments(self.plan), limits, self.state.folder / ".ray-tune"
            )
        if self.start_error:
            raise self.start_error

    def has_more(self) -> bool:
        """Returns True if paused trials of a population will run again."""
        is_population = isinstance(self.plan.search.scheduler, Pbt)
        return self.start_error is None and is_population and bool(self.state.trials_in("running"))

    def begin_trial(self) -> tuple[Trial, Path] | None:
        """Returns the next trial and its folder; first the trials that resume. Returns None if there is none now.

        A trial whose settings are not valid together fails at once, and the one after it is returned.
        """
        try:
            while trial := self._next_trial():
                folder = self.state.trial_folder(trial)
                self.runs.start_trial_run(trial, folder)
                if self._write_trial(trial, folder):
                    self.table.add_trial(trial)
                    return trial, folder
        # MLflow or the disk: no trial can begin without them.
        except Exception as error:
            self.start_error = UserError(f"no more trials can begin: {one_line(error) or type(error).__name__}")
        return None

    def _next_trial(self) -> Trial | None:
        if self.waiting:
            return self.waiting.pop(0)
        number = len(self.state.trials)
        if number >= self.plan.search.num_trials:
            self._exchange_networks()
            return self.waiting.pop(0) if self.waiting else None
        length = self.plan.max_length
        trial = Trial(number, propose_values(self.plan.search, self.state.trials, number), unit=length.unit)
        if isinstance(self.plan.search.scheduler, Pbt):
            pbt.schedule_next_segment(self.plan.search.scheduler, trial, length.count)
        self.state.trials.append(trial)
        self.state.save()
        return trial

    def _exchange_networks(self) -> None:
        """Copies the networks of the best trials to the worst once all of a population are paused, and resumes all."""
        resting, scheduler = self.state.trials_in("running"), self.plan.search.scheduler
        if not isinstance(scheduler, Pbt) or not resting or not all(trial.resting for trial in resting):
            return
        exchanged = pbt.apply_exchanges(self.plan.search, resting, self.state.trial_folder)
        for trial in resting:
            pbt.schedule_next_segment(scheduler, trial, self.plan.max_length.count)
        self.state.save()
        for trial, replaced in exchanged:
            self.runs.try_publish(partial(self.runs.close_replaced_training, self.state.trial_folder(trial)))
            shutil.rmtree(Path(replaced) / "checkpoints", ignore_errors=True)
            self.table.print_exchange(trial)
        self.waiting = resting

    def _write_trial(self, trial: Trial, folder: Path) -> bool:
        """Writes the file that a trial is run from. Returns False if its settings are not valid together."""
        search = self.plan.search
        try:
            recipe = self.plan.trial_recipe(trial.values, self.state.references)
            preflight.check_recipe(recipe, self.source)
        except UserError as error:
            trial.state, trial.reason, trial.ended = "failed", " ".join(str(error).splitlines()), time.time()
            self._record_end(trial)
            return False
        measures = tuple(objective.measure for objective in search.objectives)
        deciding = search.scheduler_objective[0] if search.scheduler_objective else None
        request = TrialRequest(measures, deciding, self.plan.encoder_stage(recipe))
        recipe = recipe.model_copy(update={"name": f"{search.name}-{trial.name}"})
        segment = pbt.next_training_segment(self.plan, trial, folder)
        write_trial_file(folder, recipe, self.store.path, self.runs.trial_tags(trial), request, segment)
        return True

    def receive_report(self, trial: Trial, report: dict[str, Any]) -> None:
        self.table.update_progress(trial, report)

    def end_trial(self, trial: Trial, error: str) -> None:
        """Records how a trial ended. `error`: Ray's error if its process died."""
        if not self.state.load_outcome(trial):
            trial.state, trial.ended, trial.reason = "failed", time.time(), explain_death(error)
        self._record_end(trial)

    def _record_end(self, trial: Trial) -> None:
        self.state.save()
        # The trial's own checkpoints contain by now what it copied.
        shutil.rmtree(self.state.trial_folder(trial) / pbt.COPIED_FOLDER, ignore_errors=True)
        if trial.resting:
            self.runs.try_publish(lambda: self.runs.log_segment(trial, self.state.trial_folder(trial)))
            self.table.add_trial(trial)
            return
        best = find_best_trial(self.state.trials, self.plan.search.objectives[0])
        self.runs.publish_trial(trial, self.state.trial_folder(trial), best.means[0] if best else None)
        self.table.add_trial(trial)
        self.table.print_end(trial)

    def finish_search(self) -> SearchResult:
        """Finds the best trial, runs the recipe with its setting or promotes its encoder if asked for, and reports.

        Raises:
            StageFailed: no trial has finished.
        """
        search, trials = self.plan.search, self.state.trials
        best = find_best_trial(trials, search.objectives[0])
        if best is None:
            self.runs.try_publish(lambda: self.runs.finish_search(None, self.state.describe_trials()))
            reason, count = Counter(trial.reason for trial in trials).most_common(1)[0]
            raise StageFailed(f"none of the {len(trials)} trials has finished; {count} of them: {reason}")
        retrained, rows, encoder = self._run_best_setting(best) if search.retrain else (None, (), best.encoder)
        promoted = None
        if search.promote and encoder:
            promoted = self.runs.tracking.promote_encoder(encoder, search.promote.name, search.promote.alias)
        self.runs.try_publish(lambda: self.runs.tag_best_trial(best, promoted))
        result = SearchResult(trials, best, promoted, retrained, rows)
        report = self._write_report(result)
        self.runs.try_publish(lambda: self.runs.finish_search(report, self.state.describe_trials()))
        if refused := self.runs.flush_unpublished():
            self.table.print_note(f"not all of this is in MLflow ({refused}); run the same command again")
        return replace(result, report=report)

    def _run_best_setting(self, best: Trial) -> tuple[Recipe, tuple[ScoreRow, ...], str | None]:
        """Runs the full recipe with the best setting. Returns it, its table, and the MLflow run of its encoder."""
        recipe = self.plan.full_recipe(best.values)
        recipe = recipe.model_copy(update={"name": f"{self.plan.search.name}-best"})
        tags = {"mlflow.parentRunId": self.runs.run_id, "firstlight.kind": "retrain"}
        ran = run_recipe(recipe, self.console, parent=ParentRun(self.state.folder / BEST_FOLDER, tags))
        stage = self.plan.encoder_stage(recipe)
        return recipe, tuple(ran.rows), next((read_run_id(i.folder) for i in ran.instances if i.stage == stage), None)

    def _write_report(self, result: SearchResult) -> Path | None:
        """Writes the report. Returns None if it cannot be written, which does not affect the results."""
        fields: dict[str, Any] = {"promoted": result.promoted, "retrained": result.retrained, "rows": result.rows}
        try:
            return write_search_report(self._make_report(result.best, **fields))
        except (OSError, UserError) as error:
            self.table.print_note(f"the report is not complete: {one_line(error)}")
            return None

    def write_partial_report(self, error: BaseException) -> None:
        """Writes a report of what is known so far, if there are trials."""
        if not self.state.trials:
            return
        # The error that ended the search is the one that the user should see.
        with contextlib.suppress(Exception):
            best = find_best_trial(self.state.trials, self.plan.search.objectives[0])
            file = write_search_report(self._make_report(best, error=describe_error(error)))
            self.console.print(f"what is known so far: {file}", soft_wrap=True, highlight=False, markup=False)
            self.runs.client.log_artifact(self.runs.run_id, str(file))

    def _make_report(self, best: Trial | None, **fields: Any) -> SearchReport:
        runs = self.runs
        return SearchReport(self.plan, self.state, self.store, runs.run_id, runs.tracking.uri, best, **fields)
