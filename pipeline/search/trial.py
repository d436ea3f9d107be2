"""A trial of a search, in the process that Ray Tune gives it: the stages of a recipe, as `firstlight run` runs them, and what became of them.

The folder of a trial:
    trial.json     the recipe, and what the search wants to know of it; written by the search
    log.txt        what `firstlight run` would have shown
    outcome.json   written once, at the end: the scores, or why there are none. A trial without it has not ended, and goes on when it is run again
    pause-6.json   of a population: the same, where its training pauses after 6 epochs
"""

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from firstlight.pipeline.config.recipe import Finetune, Recipe, Training, parse
from firstlight.pipeline.errors import Paused, StageFailed, Stopped, StopTraining, UserError
from firstlight.pipeline.files import write_json
from firstlight.pipeline.run.runner import Place, run_in
from firstlight.pipeline.search import objectives
from firstlight.pipeline.search.ledger import OUTCOME, pause_file
from firstlight.pipeline.stages.stage import Instance, Passage
from firstlight.pipeline.tracking.client import run_of
from firstlight.pipeline.tracking.progress import Rows
from firstlight.pipeline.tracking.retry import Unpublished

JOB, LOG = "trial.json", "log.txt"
REPORT_S = 1.0  # between two reports of nothing but progress


@dataclass(frozen=True)
class Wanted:
    """What a search wants of a trial. `measures`: of its objectives; `deciding`: what its scheduler decides by; `maker`: the stage that makes the
    encoder."""

    measures: tuple[str, ...]
    deciding: str | None
    maker: str | None


def write_job(
    folder: Path, recipe: Recipe, store: Path, tags: dict[str, str], wanted: Wanted, passage: Passage | None = None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "store": str(store),
        "tags": tags,
        "cwd": str(Path.cwd()),
        "verbose": os.environ.get("FIRSTLIGHT_VERBOSE", ""),
    }
    part = {**vars(passage), "begin": str(passage.begin) if passage.begin else None} if passage else None
    write_json(folder / JOB, {"recipe": recipe.dump(), **facts, "wanted": vars(wanted), "passage": part})


def _passage(part: dict[str, Any] | None) -> Passage | None:
    if part is None:
        return None
    before = tuple((int(epochs), dict(values)) for epochs, values in part["before"])
    return Passage(part["stage"], before, Path(part["begin"]) if part["begin"] else None, part["until"])


def drive(config: dict[str, Any]) -> dict[str, Any]:
    """Run the trial in `config["folder"]` to its end, or to that of its part, from where it was; Ray Tune calls this. How it ended stands in the
    folder."""
    folder = Path(config["folder"])
    job = json.loads((folder / JOB).read_text("utf-8"))
    with contextlib.suppress(
        OSError
    ):  # a machine that does not have the folder has no files below it to be found either
        os.chdir(job["cwd"])
    wanted = Wanted(**{**job["wanted"], "measures": tuple(job["wanted"]["measures"])})
    recipe, passage = parse(job["recipe"]), _passage(job["passage"])
    reporter = Reporter(recipe, wanted)
    with open(folder / LOG, "a", encoding="utf-8") as log:
        place = Place(folder, job["tags"], store=Path(job["store"]), listener=reporter, passage=passage)
        outcome = attempt(recipe, wanted, place, Console(file=log, width=140))
    outcome = {
        **outcome,
        "seen": reporter.seen,
        "training": reporter.training,
        "seconds": round(time.monotonic() - reporter.started, 1),
    }
    if outcome["state"] == "running" and (not reporter.seen or reporter.seen[-1][0] != passage.until):  # type: ignore[union-attr]
        outcome |= {"state": "failed", "reason": f"{wanted.deciding} is not logged where the training pauses"}
    name = pause_file(passage.until) if passage and outcome["state"] == "running" else OUTCOME
    write_json(folder / name, {**outcome, "ended": time.time()})
    return {"progress": 1.0, "stage": outcome["state"]}


def attempt(recipe: Recipe, wanted: Wanted, place: Place, console: Console) -> dict[str, Any]:
    """Whatever goes wrong is the trial's own: it is told in one line, and the search goes on."""
    state: Literal["stopped", "failed", "running"] = "failed"
    try:
        _, instances = run_in(place, recipe, console)
        scores = [objectives.by_seed(measure, recipe, instances) for measure in wanted.measures]
        return {"state": "done", "scores": scores, "encoder": _made_by(wanted.maker, instances), "reason": ""}
    except Stopped as error:
        state, reason = "stopped", str(error)
    except Paused:
        state, reason = "running", ""
    except Unpublished as error:
        return {"state": "failed", "reason": " ".join(str(error).split())[:500], "again": True}
    except (UserError, StopTraining, StageFailed) as error:
        reason = str(error)
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
        console.print_exception()
    return {"state": state, "reason": " ".join(reason.split())[:500]}


def _made_by(stage: str | None, instances: Sequence[Instance]) -> str | None:
    """The MLflow run of the first seed of a stage."""
    first = next((instance for instance in instances if instance.stage == stage), None)
    return None if first is None else run_of(first.folder)


class Reporter:
    """Tells Ray Tune how far a trial is, and every value of what the scheduler decides by, of the first seed. A `follow.Listener`."""

    def __init__(self, recipe: Recipe, wanted: Wanted) -> None:
        self.recipe, self.names = recipe, list(recipe.stages)
        self.weights = [weight(stage) for stage in recipe.stages.values()]
        self.stage, _, self.key = (wanted.deciding or "").partition(".")
        self.seen: list[tuple[float, float]] = []
        self.training = ""  # the folder of what the scheduler decides upon
        self.started = time.monotonic()
        self.told = 0.0

    def __call__(self, title: str, share: float, file: Path, rows: Rows) -> None:
        place = self.names.index(title)
        progress = (sum(self.weights[:place]) + share * self.weights[place]) / sum(self.weights)
        loss = next((f"loss {row['loss']:.4g}" for row in reversed(rows) if "loss" in row), "")
        told = {"progress": progress, "stage": title, "so_far": loss}
        if title == self.stage and file.parent.name.startswith(f"{title}-seed{self.recipe.seeds[0]}-"):
            for row in rows:
                if self.key in row:
                    self._value(told, file.parent, row)
        if time.monotonic() - self.told > REPORT_S:
            self._report(told)

    def _value(self, told: dict[str, Any], training: Path, row: dict[str, Any]) -> None:
        stage = self.recipe.stages[self.stage]
        assert isinstance(stage, Training)
        epochs, value = stage.epochs * row["step"] / row["of"], float(row[self.key])
        self.training = str(training)
        if self.seen and epochs <= self.seen[-1][0]:  # steps that a resumed worker makes again
            return
        self.seen.append((epochs, value))
        so_far = f"{self.key} {value:.4g}"
        self._report(
            {
                **told,
                "so_far": so_far,
                "epochs": epochs,
                "value": value,
                "training": self.training,
                "last": row["step"] == row["of"],
            }
        )

    def _report(self, told: dict[str, Any]) -> None:
        from ray import tune

        self.told = time.monotonic()
        tune.report(told)


def weight(stage: Any) -> float:
    """How long a stage takes beside others, roughly: passes over the images, of which a training's are three times as dear."""
    if isinstance(stage, Finetune):
        return 3.0 * stage.epochs * len(stage.arms) * max(len(stage.learning_rates), 1)
    return 3.0 * stage.epochs if isinstance(stage, Training) else 2.0
