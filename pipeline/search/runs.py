"""The MLflow runs of a search: one of its own, below it one for each trial, and below that those of the trial's stages."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from firstlight.pipeline.config.recipe import Downstream, Recipe
from firstlight.pipeline.search.ledger import Ledger, Trial
from firstlight.pipeline.search.space import Plan
from firstlight.pipeline.stages.stage import code_version
from firstlight.pipeline.tracking.client import RUN_FILE, Tracking, run_of
from firstlight.pipeline.tracking.figures import FOLDER, pictures

STATUS = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


def named(measure: str) -> str:
    """A measure as MLflow takes it."""
    return measure.replace("@", "_at_")


class SearchRuns:
    """Writes them. Only the search's own process does, but for the stages of a trial, which are the trial's.

    Raises:
        UserError: as `Tracking`.
    """

    def __init__(self, plan: Plan, recipe: Recipe, folder: Path) -> None:
        self.plan, self.folder, self.tracking = plan, folder, Tracking(recipe)
        self.client = self.tracking.client
        search = plan.search
        self.tags = {
            "firstlight.kind": "search",
            "firstlight.recipe": recipe.name,
            "mlflow.note.content": search.description,
        }
        params = {
            f"space.{key}": json.dumps(d.model_dump(mode="json", exclude_none=True)) for key, d in search.space.items()
        }
        params |= {
            "algorithm": search.algorithm,
            "scheduler": search.scheduler.name,
            "seed": str(search.seed),
            "fingerprint": folder.name,
        }
        params |= {f"objective{k}": f"{o.mode} {o.measure}" for k, o in enumerate(search.objectives)} | {
            "code": code_version()
        }
        self.run_id = self.tracking.start(search.name, folder / RUN_FILE, params, self.tags)
        self.client.log_dict(self.run_id, search.model_dump(mode="json"), "search.json")
        self.late: list[Callable[[], None]] = []  # what MLflow refused, to be offered again

    def tags_of(self, trial: Trial) -> dict[str, str]:
        return {"mlflow.parentRunId": self.run_id, "firstlight.kind": "trial", "firstlight.trial": str(trial.number)}

    def begin(self, trial: Trial, folder: Path) -> None:
        """Open a trial's run, the same one as ever."""
        folder.mkdir(parents=True, exist_ok=True)
        shown = {key: value if isinstance(value, str) else json.dumps(value) for key, value in trial.values.items()}
        self.tracking.start(
            f"trial {trial.name}", folder / RUN_FILE, {**shown, "code": trial.code}, self.tags_of(trial)
        )

    def end(self, trial: Trial, folder: Path, best: float | None) -> None:
        """Scores and state of a trial, and the best of the first objective so far. MLflow may be away: then at the end."""
        self.offer(lambda: self._end(trial, folder, best))

    def pause(self, trial: Trial, folder: Path) -> None:
        """What a trial of a population has come to at the end of a part, and the numbers among the settings that it had."""
        part, deciding = trial.parts[-1], self.plan.search.deciding
        assert deciding is not None
        numbers = {f"space.{key}": float(value) for key, value in part.values.items() if isinstance(value, int | float)}
        self.tracking.metrics(
            _known(folder), [{"step": part.epochs, "time": trial.ended, named(deciding[0]): part.value, **numbers}]
        )

    def give_up(self, folder: Path) -> None:
        """Close the run of the training that a trial does not go on with."""
        self._close_below(_known(folder), "KILLED")

    def offer(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception:  # whatever a server can answer; `settle` tells
            self.late.append(write)

    def settle(self) -> str | None:
        """Offer again what was refused; the last reason, None where MLflow has all."""
        waiting, self.late = self.late, []
        reason = None
        for write in waiting:
            try:
                write()
            except Exception as error:
                self.late.append(write)
                reason = (str(error) or type(error).__name__).splitlines()[0][:160]
        return reason

    def _end(self, trial: Trial, folder: Path, best: float | None) -> None:
        run_id = _known(folder)
        self.client.set_tag(run_id, "firstlight.state", trial.state)
        if trial.reason:
            self.client.set_tag(run_id, "firstlight.reason", trial.reason)
        names = [named(objective.measure) for objective in self.plan.search.objectives]
        scores = dict(zip(names, trial.means, strict=False))
        self.tracking.numbers(run_id, {**scores, "seconds": trial.seconds})
        for name, by_seed in zip(names, trial.scores, strict=False):
            self.tracking.numbers(
                run_id, {f"{name}/{k}": value for k, value in enumerate(by_seed)} if len(by_seed) > 1 else {}
            )
        self._close_below(run_id, STATUS[trial.state])
        self.tracking.finish(run_id, STATUS[trial.state])
        told = {**scores, **({"best": best} if best is not None and scores else {})}
        self.tracking.metrics(self.run_id, [{"step": trial.number, "time": trial.ended, **told}])

    def _close_below(self, run_id: str, status: str) -> None:
        """The runs of stages that a process which was killed has left open."""
        below = f"tags.`mlflow.parentRunId` = '{run_id}' and attributes.status = 'RUNNING'"
        for run in self.client.search_runs([self.tracking.experiment], below):
            self.tracking.finish(run.info.run_id, status)

    def finish(self, report: Path | None, table: list[dict[str, Any]]) -> None:
        for file, _ in pictures(self.folder):
            self.client.log_artifact(self.run_id, str(file), FOLDER)
        if report is not None:
            self.client.log_artifact(self.run_id, str(report))
        self.client.log_dict(self.run_id, {"trials": table}, "trials.json")
        self.tracking.finish(self.run_id)

    def tell_best(self, trial: Trial, reference: str | None) -> None:
        tags = {"firstlight.best": str(trial.number), **({"firstlight.promoted": reference} if reference else {})}
        for key, value in tags.items():
            self.client.set_tag(self.run_id, key, value)

    def abandon(self, ledger: Ledger | None, status: str) -> None:
        """Close what is open, as KILLED or FAILED; the next command opens it again."""
        for trial in ledger.of_state("running") if ledger else ():
            with contextlib.suppress(Exception):  # MLflow may be what failed; the first error is the one to show
                run_id = _known(ledger.place(trial))  # type: ignore[union-attr]
                self._close_below(run_id, status)
                self.tracking.finish(run_id, status)
        with contextlib.suppress(Exception):
            self.tracking.finish(self.run_id, status)

    def pinned(self, recipe: Recipe) -> dict[str, str]:
        """The encoders that stages name by alias, as they are now: one that moves must not move under a search.

        Raises:
            UserError: there is no such model.
        """
        taken = {
            name: stage.encoder
            for name, stage in recipe.stages.items()
            if isinstance(stage, Downstream) and stage.takes_encoder
        }
        return {
            name: self.tracking.pin(reference, f"stages.{name}.encoder")
            for name, reference in taken.items()
            if reference != "previous"
        }


def _known(folder: Path) -> str:
    run_id = run_of(folder)
    assert run_id is not None, "a trial's run is started before it"
    return run_id
