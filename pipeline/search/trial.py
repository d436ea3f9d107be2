"""A trial of a search: the stages of a recipe, run as by `firstlight run`, in a separate process.

The folder of a trial:
    trial.json     the recipe, and what the search asks of the trial; the search writes it
    log.txt        what `firstlight run` would print
    outcome.json   the scores, or why there are none; written once, at the end. A trial without it has not ended, and
                   resumes when it is run again
    pause-6.json   the same, in a population, at the end of a segment: the training pauses after 6 epochs (or steps)
"""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from rich.console import Console

from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.stages import StageConfig, TrainingOptions
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import Paused, StageFailed, Stopped, StopTraining, UserError, one_line, take_first_line
from firstlight.pipeline.records import Count, RecordShape, read_json_record, write_sealed_json
from firstlight.pipeline.run.publishing import ParentRun
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.search import objectives
from firstlight.pipeline.search.ledger import OUTCOME_FILE, pause_file_name
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.stages.stage import StageInstance, TrainingSegment
from firstlight.pipeline.terminal import SafeConsole
from firstlight.pipeline.tracking.outbox import Unpublished
from firstlight.pipeline.tracking.progress import JsonRows
from firstlight.pipeline.tracking.run_file import read_run_id

TRIAL_FILE, TRIAL_LOG_FILE = "trial.json", "log.txt"
# Seconds between two reports that contain progress only.
REPORT_INTERVAL_S = 1.0
MAX_REASON_CHARS = 500

Report = dict[str, Any]


@dataclass(frozen=True)
class TrialRequest:
    """The measures and the encoder that a search asks of a trial."""

    # The measures of its objectives.
    measures: tuple[str, ...]
    # The measure that its scheduler decides by, None without a scheduler.
    deciding: str | None
    # The stage that makes the encoder, None if no stage does.
    maker: str | None


def write_trial_file(
    folder: Path,
    recipe: Recipe,
    store: Path,
    tags: dict[str, str],
    request: TrialRequest,
    segment: TrainingSegment | None = None,
) -> None:
    """Writes all that `run_trial` needs into the folder of a trial. `tags`: those of its MLflow run."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        "recipe": recipe.dump(),
        "store": str(store),
        "tags": tags,
        "cwd": str(Path.cwd()),
        "verbose": os.environ.get("FIRSTLIGHT_VERBOSE", ""),
        "request": vars(request),
        "segment": {**vars(segment), "begin": str(segment.begin) if segment.begin else None} if segment else None,
    }
    write_sealed_json(folder / TRIAL_FILE, fields)


class _RequestShape(RecordShape):
    """A `TrialRequest` as JSON."""

    measures: list[str]
    deciding: str | None
    maker: str | None


class _SegmentRecordShape(RecordShape):
    """A `TrainingSegment` as JSON."""

    stage: str
    before: list[Annotated[list[Any], Field(min_length=2, max_length=2)]]
    begin: str | None
    until: Count | None


class _TrialFileShape(RecordShape):
    """The file that `write_trial_file` writes."""

    recipe: dict[str, Any]
    store: str
    tags: dict[str, str]
    cwd: str
    request: _RequestShape
    segment: _SegmentRecordShape | None


TRIAL_SHAPE = TypeAdapter(_TrialFileShape)


def _parse_request(fields: dict[str, Any]) -> TrialRequest:
    return TrialRequest(**{**fields, "measures": tuple(fields["measures"])})


def _parse_segment(fields: dict[str, Any] | None) -> TrainingSegment | None:
    if fields is None:
        return None
    before = tuple((int(end), dict(values)) for end, values in fields["before"])
    begin = Path(fields["begin"]) if fields["begin"] else None
    return TrainingSegment(fields["stage"], before, begin, fields["until"])


def run_trial(folder: Path, report: Callable[[Report], None]) -> Report:
    """Runs or resumes the trial in `folder`, up to its end or the end of its segment. Returns the last report.

    The outcome of the trial is written to its folder. `report` is called with its progress on the way.
    """
    fields = read_json_record(folder / TRIAL_FILE, TRIAL_SHAPE)
    assert fields is not None, "the search writes the file before it starts the trial"
    # A machine without this working directory cannot have files below it either.
    with contextlib.suppress(OSError):
        os.chdir(fields["cwd"])
    request, segment = _parse_request(fields["request"]), _parse_segment(fields["segment"])
    recipe = parse_recipe(fields["recipe"])
    images = Store.open(Path(fields["store"])).splits["train"]
    reporter = TrialReporter(recipe, request, images, report)
    with open(folder / TRIAL_LOG_FILE, "a", encoding="utf-8") as log:
        parent = ParentRun(folder, fields["tags"], store=Path(fields["store"]), listener=reporter, segment=segment)
        outcome = run_stages(recipe, request, parent, SafeConsole(file=log, width=140))
    outcome |= {"seen": reporter.seen, "training": reporter.training, "seconds": reporter.seconds()}
    name = OUTCOME_FILE
    # A trial pauses only at the end of a segment of a population.
    if outcome["state"] == "running":
        assert segment is not None
        if reporter.seen and reporter.seen[-1][0] == segment.until:
            name = pause_file_name(segment.until)
        else:
            outcome |= {"state": "failed", "reason": f"{request.deciding} is not logged where the training pauses"}
    write_sealed_json(folder / name, {**outcome, "ended": time.time()})
    return {"progress": 1.0, "stage": outcome["state"]}


def run_stages(recipe: Recipe, request: TrialRequest, parent: ParentRun, console: Console) -> dict[str, Any]:
    """Runs the stages of a trial. Returns its state and scores, or the reason why there are none, on one line.

    An error is part of the outcome and is not raised, so that the search continues.
    """
    state: Literal["stopped", "failed", "running"] = "failed"
    try:
        instances = run_recipe(recipe, console, parent=parent).instances
        scores = [objectives.read_scores(measure, recipe, instances) for measure in request.measures]
        encoder = _find_encoder_run(request.maker, instances)
        return {"state": "done", "scores": scores, "encoder": encoder, "reason": ""}
    except Stopped as error:
        state, reason = "stopped", str(error)
    except Paused:
        state, reason = "running", ""
    except Unpublished as error:
        return {"state": "failed", "reason": one_line(error, MAX_REASON_CHARS), "again": True}
    except (UserError, StopTraining, StageFailed) as error:
        reason = str(error)
    except Exception as error:
        reason = f"{type(error).__name__}: {take_first_line(error) or 'no reason given'}"
        console.print_exception()
    return {"state": state, "reason": one_line(reason, MAX_REASON_CHARS)}


def explain_death(error: str) -> str:
    """Returns why the process of a trial died, on one line, from Ray's error."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    memory = next((line for line in lines if "memory" in line.lower()), None)
    if memory:
        return f"its process was killed because memory ran out: {memory[:200]}"
    return "its process was killed, or ended without an error message"


def _find_encoder_run(stage: str | None, instances: Sequence[StageInstance]) -> str | None:
    """Returns the MLflow run of the first seed of a stage, None if there is none."""
    first = next((instance for instance in instances if instance.stage == stage), None)
    return None if first is None else read_run_id(first.folder)


class TrialReporter:
    """Reports the progress of a trial, and every value of the first seed that the scheduler decides by.

    It is a `Listener` of the run's metrics. `images`: the number of training images.
    """

    def __init__(self, recipe: Recipe, request: TrialRequest, images: int, report: Callable[[Report], None]) -> None:
        self.recipe, self.report = recipe, report
        self.weights = {name: weigh_stage(stage, images) for name, stage in recipe.stages.items()}
        self.stage, self.key = objectives.parse_measure(request.deciding or "")
        # [length, value] of each report to the scheduler, in the unit of the training's length.
        self.seen: list[tuple[float, float]] = []
        # The folder of the training that the scheduler decides about.
        self.training = ""
        self.started = time.monotonic()
        self.last_report = 0.0

    def seconds(self) -> float:
        return round(time.monotonic() - self.started, 1)

    def __call__(self, instance: StageInstance, share: float, rows: JsonRows) -> None:
        names = list(self.weights)
        finished = sum(self.weights[name] for name in names[: names.index(instance.stage)])
        progress = (finished + share * self.weights[instance.stage]) / sum(self.weights.values())
        loss = next((f"loss {row['loss']:.4g}" for row in reversed(rows) if "loss" in row), "")
        report = {"progress": progress, "stage": instance.stage, "so_far": loss}
        if instance.stage == self.stage and instance.seed == self.recipe.seeds[0]:
            for row in rows:
                if self.key in row:
                    self._report_value(report, instance, row)
        if time.monotonic() - self.last_report > REPORT_INTERVAL_S:
            self._send_report(report)

    def _report_value(self, report: Report, instance: StageInstance, row: dict[str, Any]) -> None:
        stage = self.recipe.stages[self.stage]
        assert isinstance(stage, TrainingOptions)
        length, value = stage.length, float(row[self.key])
        trained = length.count * row["step"] / row["of"]
        self.training = str(instance.folder)
        # A resumed worker repeats the steps since its checkpoint.
        if self.seen and trained <= self.seen[-1][0]:
            return
        self.seen.append((trained, value))
        fields = {"trained": trained, "unit": length.unit, "value": value, "training": self.training}
        is_last = row["step"] == row["of"]
        self._send_report({**report, "so_far": f"{self.key} {value:.4g}", **fields, "last": is_last})

    def _send_report(self, report: Report) -> None:
        self.last_report = time.monotonic()
        self.report(report)


def weigh_stage(stage: StageConfig, images: int) -> float:
    """Returns the rough duration of a stage, in passes over so many images: a pass of a training counts three."""
    if not isinstance(stage, TrainingOptions):
        return 2.0
    passes = stage.epochs if stage.epochs is not None else stage.length.count * stage.batch_size / images
    return 3.0 * passes * stage_kind(stage).count_trainings(stage)
