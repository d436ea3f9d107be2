"""A search: trials of a recipe with other settings, judged on held-out data, run side by side by Ray Tune, and gone on with where they were stopped.

runs/<name>/<fingerprint>/
    ledger.json        every trial: its settings, state and scores
    trials/000/        the files of a trial, as of a run of a recipe (see `firstlight.pipeline.search.trial`)
    best/              the files of the recipe's run with the best setting, where `retrain` asks for it
    report.html        all of it on a page; recipe.yaml and search.yaml repeat it
"""

import contextlib
import shutil
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.sources import Source, open_source
from firstlight.pipeline.data.splits import split
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import StageFailed, UserError
from firstlight.pipeline.files import exclusive_lock
from firstlight.pipeline.report import run_report
from firstlight.pipeline.report.score_table import Row
from firstlight.pipeline.run import data_checks, nodes, preflight
from firstlight.pipeline.run.nodes import Node
from firstlight.pipeline.run.ray_session import Session, local_cpus
from firstlight.pipeline.run.runner import Place, prepared, run_in
from firstlight.pipeline.search import pbt
from firstlight.pipeline.search import report as search_page
from firstlight.pipeline.search.capacity import of_driver, trials_at_once
from firstlight.pipeline.search.ledger import Ledger, Trial
from firstlight.pipeline.search.objectives import Objective
from firstlight.pipeline.search.progress import View
from firstlight.pipeline.search.runs import SearchRuns
from firstlight.pipeline.search.sampler import propose
from firstlight.pipeline.search.space import Pbt, Plan
from firstlight.pipeline.search.trial import Wanted, write_job
from firstlight.pipeline.stages.stage import code_version
from firstlight.pipeline.tracking.client import run_of


@dataclass(frozen=True)
class Found:
    """What a search has come to. `rows`: of the table of the recipe's run with the best setting, () where it was not run."""

    trials: list[Trial]
    best: Trial
    promoted: str | None
    retrained: Recipe | None = None
    rows: tuple[Row, ...] = ()
    report: Path | None = None


def search(plan: Plan, console: Console) -> Found:
    """Do what is left to do of a search.

    Raises:
        UserError: a mistake that the user can mend, found before Ray starts where possible.
        StageFailed: all trials have failed; or, as StopTraining, the recipe with the best setting.
    """
    recipe = plan.trial(plan.corners()[0])
    source = check(plan, recipe)
    folder = recipe.storage.resolve() / plan.search.name / plan.fingerprint()
    with exclusive_lock(folder, plan.search.name):
        runs, running = SearchRuns(plan, recipe, folder), None
        try:
            with Session(recipe.scale, recipe.stream, console.print) as session:
                store = prepared(recipe, session, console, Place(folder, runs.tags))
                check_images(plan, store)
                running = _Search(plan, Ledger(folder, store.hash), runs, (source, store), console)
                running.run(session)
                return running.end()
        except BaseException as error:
            if running:
                running.leave(error)
            runs.abandon(
                running.ledger if running else None, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            )
            raise


def check(plan: Plan, recipe: Recipe) -> Source:
    """Everything that can be known before Ray starts: room for a trial, and every end of the space against the machine and the images' source,
    which is what is returned.

    Raises:
        UserError: names the key, the value and what is valid.
    """
    scale = recipe.scale
    if scale.fewest < scale.most:
        raise UserError(
            f"scale.workers: {[scale.fewest, scale.most]} is not valid in a search: trials are given room by number; valid: one number"
        )
    if scale.address == "local":
        trials_at_once(scale, recipe.stream, [Node(local_cpus(scale), torch.cuda.device_count())])
    source = open_source(recipe.dataset)
    for values in plan.corners():
        try:
            preflight.check(plan.trial(values), source)
        except UserError as error:
            raise UserError(plan.told(str(error), values)) from None
    pbt.check_networks(plan, 0 if source.annotations else len(source.classes))
    return source


def check_images(plan: Plan, store: Store) -> None:
    """Every end of the space against the images that there are.

    Raises:
        UserError: as `enough.check_images`.
    """
    for values in plan.corners():
        recipe = plan.trial(values)
        try:
            data_checks.check_images(recipe, split(store, recipe.dataset))
        except UserError as error:
            raise UserError(plan.told(str(error), values)) from None


def best_of(trials: list[Trial], objective: Objective) -> Trial | None:
    """Of those that are done, by the mean over seeds of the first objective; of equal ones the first."""
    done = [trial for trial in trials if trial.state == "done"]
    return max(done, key=lambda trial: objective.sign * trial.means[0]) if done else None


class _Search:
    """The state of one `firstlight search`; a `tuning.Trials`."""

    def __init__(
        self, plan: Plan, ledger: Ledger, runs: SearchRuns, images: tuple[Source, Store], console: Console
    ) -> None:
        self.plan, self.ledger, self.runs, self.console = plan, ledger, runs, console
        self.source, self.store = images
        self.view = View(console, plan.search)
        self.trouble: UserError | None = None  # why no more trials can begin
        if not ledger.trials:
            ledger.references = runs.pinned(plan.base())
            ledger.save()
        for trial in (trial for trial in ledger.trials if trial.again):
            ledger.reopen(trial)
        for trial in ledger.of_state("running"):  # one that ended when nobody was left to see it
            if not trial.resting and ledger.absorb(trial):
                self._close(trial)
        self.waiting = [trial for trial in ledger.of_state("running") if not trial.resting]
        for trial in ledger.trials:
            self.view.know(trial)
        self._tell_of_before()

    def _tell_of_before(self) -> None:
        waiting = len(self.ledger.of_state("running"))
        ended = len(self.ledger.trials) - waiting
        if ended or waiting:
            self.view.note(f"{ended} trials have ended before, {waiting} go on where they were stopped")
        if any(trial.code != code_version() for trial in self.ledger.trials):
            self.view.note(
                "the code has changed since some of the trials were run; their scores may not be what they would be now"
            )

    def run(self, session: Session) -> None:
        """All trials that have not ended."""
        ended = self.ledger.of_state("done", "stopped", "failed")
        left = self.plan.search.total - len(ended)
        if left <= 0:
            return
        from firstlight.pipeline.search import tune

        session.start(always=True)
        recipe = self.plan.trial(self.plan.corners()[0])
        at_once = trials_at_once(recipe.scale, recipe.stream, nodes.alive(), self.plan.search.concurrency)
        scheduler = tune.scheduler(self.plan.search, ended, self._epochs())
        with self.view:
            self.view.start(left, at_once)
            room = tune.Room(at_once, of_driver(recipe.scale), recipe.scale.max_failures)
            tune.run_trials(self, scheduler, left * self._parts(), room, self.ledger.folder / ".ray-tune")
        if self.trouble:
            raise self.trouble

    def _epochs(self) -> int:
        """Of the training that a scheduler decides upon, at most."""
        if self.plan.search.deciding is None:
            return 1
        stage = self.plan.search.deciding[0].partition(".")[0]
        return max(int(self.plan.trial(values).stages[stage].epochs) for values in self.plan.corners())  # type: ignore[union-attr]

    def _parts(self) -> int:
        """That a trial is run in, at most."""
        scheduler = self.plan.search.scheduler
        return pbt.parts_of(scheduler, self._epochs()) if isinstance(scheduler, Pbt) else 1

    def more(self) -> bool:
        """Of a population, whose trials wait for each other."""
        return (
            self.trouble is None
            and isinstance(self.plan.search.scheduler, Pbt)
            and bool(self.ledger.of_state("running"))
        )

    def begin(self) -> tuple[Trial, Path] | None:
        """The next trial: first those that were begun. One whose settings do not go together has failed at once."""
        try:
            while trial := self._next():
                folder = self.ledger.place(trial)
                self.runs.begin(trial, folder)
                if self._written(trial, folder):
                    self.view.know(trial)
                    return trial, folder
        except Exception as error:  # MLflow, or the disk: no trial can begin without
            first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            self.trouble = UserError(f"no more trials can begin: {first}")
        return None

    def _next(self) -> Trial | None:
        if self.waiting:
            return self.waiting.pop(0)
        number = len(self.ledger.trials)
        if number >= self.plan.search.total:
            self._exchange()
            return self.waiting.pop(0) if self.waiting else None
        trial = Trial(number, propose(self.plan.search, self.ledger.trials, number))
        if isinstance(self.plan.search.scheduler, Pbt):
            pbt.advance(self.plan.search.scheduler, trial, self._epochs())
        self.ledger.trials.append(trial)
        self.ledger.save()
        return trial

    def _exchange(self) -> None:
        """Of a population, of which all that have not ended rest: who goes on from whose networks, and all may go on."""
        resting, scheduler = self.ledger.of_state("running"), self.plan.search.scheduler
        if not isinstance(scheduler, Pbt) or not resting or not all(trial.resting for trial in resting):
            return
        changed = pbt.exchange(self.plan.search, resting, self.ledger.place)
        for trial in resting:
            pbt.advance(scheduler, trial, self._epochs())
        self.ledger.save()
        for trial, given_up in changed:
            self.runs.offer(partial(self.runs.give_up, self.ledger.place(trial)))
            shutil.rmtree(Path(given_up) / "checkpoints", ignore_errors=True)
            self.view.exchanged(trial)
        self.waiting = resting

    def _written(self, trial: Trial, folder: Path) -> bool:
        search = self.plan.search
        try:
            recipe = self.plan.trial(trial.values, self.ledger.references)
            preflight.check(recipe, self.source)
        except UserError as error:
            trial.state, trial.reason, trial.ended = "failed", " ".join(str(error).splitlines()), time.time()
            self._close(trial)
            return False
        recipe = recipe.model_copy(update={"name": f"{search.name}-{trial.name}"})
        wanted = Wanted(
            tuple(o.measure for o in search.objectives),
            search.deciding[0] if search.deciding else None,
            self.plan.maker(recipe),
        )
        write_job(
            folder, recipe, self.store.path, self.runs.tags_of(trial), wanted, pbt.passage(self.plan, trial, folder)
        )
        return True

    def told(self, trial: Trial, report: dict[str, Any]) -> None:
        self.view.report(trial, report)

    def ended(self, trial: Trial, error: str) -> None:
        if not self.ledger.absorb(trial):
            trial.state, trial.ended, trial.reason = "failed", time.time(), _of_death(error)
        self._close(trial)

    def _close(self, trial: Trial) -> None:
        self.ledger.save()
        shutil.rmtree(
            self.ledger.place(trial) / pbt.HANDED, ignore_errors=True
        )  # what it went on from is in its own checkpoints by now
        if trial.resting:
            self.runs.offer(lambda: self.runs.pause(trial, self.ledger.place(trial)))
            self.view.know(trial)
            return
        best = best_of(self.ledger.trials, self.plan.search.objectives[0])
        self.runs.end(trial, self.ledger.place(trial), best.means[0] if best else None)
        self.view.know(trial)
        self.view.ended(trial)

    def end(self) -> Found:
        """The best trial, retrained or promoted as it is asked for, and what there is to show of all.

        Raises:
            StageFailed: there is none.
        """
        search, trials = self.plan.search, self.ledger.trials
        best = best_of(trials, search.objectives[0])
        table = [
            {
                "trial": t.number,
                "state": t.state,
                **t.values,
                "scores": t.scores,
                "seconds": t.seconds,
                "reason": t.reason,
                "parts": list(map(vars, t.parts)),
            }
            for t in trials
        ]
        if best is None:
            self.runs.offer(lambda: self.runs.finish(None, table))
            reason, count = Counter(trial.reason for trial in trials).most_common(1)[0]
            raise StageFailed(f"none of the {len(trials)} trials has come to its end; {count} of them: {reason}")
        retrained = self._retrain(best) if search.retrain else None
        promoted = self._promote(best, retrained)
        self.runs.offer(lambda: self.runs.tell_best(best, promoted))
        found = Found(trials, best, promoted, *((retrained[0], tuple(retrained[1])) if retrained else ()))
        report = self._report(found)
        self.runs.offer(lambda: self.runs.finish(report, table))
        if refused := self.runs.settle():
            self.view.note(f"not all of this is in MLflow ({refused}); run the same command again")
        return replace(found, report=report)

    def _report(self, found: Found) -> Path | None:
        """Write the page; that it could not be written makes nothing of the results undone."""
        try:
            return search_page.write(
                self._told(best=found.best, promoted=found.promoted, retrained=found.retrained, rows=found.rows)
            )
        except (OSError, UserError) as error:
            self.view.note(f"the report is not whole: {' '.join(str(error).split())[:200]}")
            return None

    def leave(self, error: BaseException) -> None:
        """What is known so far on a page, where trials were begun."""
        if not self.ledger.trials:
            return
        with contextlib.suppress(Exception):  # the first error is the one to show
            best = best_of(self.ledger.trials, self.plan.search.objectives[0])
            file = search_page.write(self._told(best=best, error=run_report.told(error)))
            self.console.print(f"what is known so far: {file}", soft_wrap=True, highlight=False)
            self.runs.client.log_artifact(self.runs.run_id, str(file))

    def _told(self, **what: Any) -> search_page.Searched:
        return search_page.Searched(
            self.plan, self.ledger, self.store, self.runs.run_id, self.runs.tracking.uri, **what
        )

    def _retrain(self, best: Trial) -> tuple[Recipe, list[Row], str | None]:
        """The whole recipe with the best setting; and the MLflow run of its encoder."""
        recipe = self.plan.whole(best.values)
        recipe = recipe.model_copy(update={"name": f"{self.plan.search.name}-best"})
        place = Place(
            self.ledger.folder / "best", {"mlflow.parentRunId": self.runs.run_id, "firstlight.kind": "retrain"}
        )
        rows, instances = run_in(place, recipe, self.console)
        maker = self.plan.maker(recipe)
        return recipe, rows, next((run_of(i.folder) for i in instances if i.stage == maker), None)

    def _promote(self, best: Trial, retrained: tuple[Recipe, list[Row], str | None] | None) -> str | None:
        encoder, promote = retrained[2] if retrained else best.encoder, self.plan.search.promote
        if promote is None or encoder is None:
            return None
        return self.runs.tracking.promote(encoder, promote.name, promote.alias)


def _of_death(error: str) -> str:
    """Why a process is gone, in a line, from what Ray says of it."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    memory = next((line for line in lines if "memory" in line.lower()), None)
    if memory:
        return f"its process was ended for want of memory: {memory[:200]}"
    return "its process was killed, or broke off without a word"
