"""`firstlight runs`: recipes, searches and their runs, as a table for terminals and tab-separated lines for pipes."""

import datetime
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from firstlight.pipeline.files import LOCK_FILE, find_lock_owner
from firstlight.pipeline.report.run_scores import format_image_counts, format_scores
from firstlight.pipeline.terminal import Column, build_table, format_ago, format_duration, format_tsv
from firstlight.pipeline.tracking.lineage import Lineage, Run
from firstlight.pipeline.tracking.metric_keys import SECONDS_METRIC

# MLflow's statuses, as they are displayed.
RUN_STATES = {
    **{"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped", "RUNNING": "running", "SCHEDULED": "waiting"},
}
RUN_STATE_STYLES = {"finished": "green", "failed": "red", "stopped": "yellow", "running": "cyan"}
# Trials of a search that `firstlight runs` lists; `firstlight show` lists all.
MAX_TRIALS_LISTED = 10
NARROW_COLUMNS = (
    Column("run", min_width=17),
    Column("id", fixed=True),
    Column("state", fixed=True),
    Column("scores, and the reference for `encoder`"),
)
WIDE_COLUMNS = (
    *NARROW_COLUMNS[:3],
    Column("started", fixed=True),
    Column("duration", numeric=True, fixed=True),
    NARROW_COLUMNS[3],
)
# Characters of a terminal that has space for `WIDE_COLUMNS`.
WIDE_TERMINAL = 110
TSV_HEADINGS = ("kind", "name", "id", "state", "start", "seconds", "numbers", "reference")


@dataclass(frozen=True)
class RunLine:
    """One run, or the seeds of a stage together, `depth` levels below the top.

    A line without runs has only a `remark`.
    """

    depth: int
    name: str
    runs: tuple[Run, ...]
    numbers: str = ""
    reference: str = ""
    remark: str = ""


def run_state(lineage: Lineage, run: Run) -> str:
    """Returns MLflow's status, except that a running run is `stopped` if no process holds the lock of its recipe."""
    state = RUN_STATES.get(run.status, run.status.lower())
    if state != "running":
        return state
    recipe = run if run.is_composite else lineage.find_recipe(run)
    folder = lineage.location.storage / (recipe.name if recipe else "")
    return "stopped" if (folder / LOCK_FILE).is_file() and find_lock_owner(folder) is None else state


def run_lines(lineage: Lineage, name: str = "", limit: int | None = None) -> Iterator[RunLine]:
    """Yields recipes and searches whose name contains `name`, newest first, each followed by its stages and trials."""
    tops = [run for run in lineage.list_roots() if name.lower() in run.name.lower()]
    for top in tops[:limit]:
        yield RunLine(0, f"{top.name} ({top.kind})" if top.kind != "recipe" else top.name, (top,))
        if top.kind == "search":
            yield from _search_lines(lineage, top)
        else:
            yield from _recipe_lines(lineage, top)
    if limit is not None and len(tops) > limit:
        yield RunLine(0, "", (), remark=f"and {len(tops) - limit} earlier: --limit {len(tops)}")


def _search_lines(lineage: Lineage, search: Run) -> Iterator[RunLine]:
    trials = lineage.list_trials(search)
    for trial in trials[-MAX_TRIALS_LISTED:]:
        numbers, reference = trial_results(lineage, trial)
        yield RunLine(1, trial.name, (trial,), numbers, reference)
    if len(trials) > MAX_TRIALS_LISTED:
        earlier = f"and {len(trials) - MAX_TRIALS_LISTED} earlier trials: firstlight show {search.short_id}"
        yield RunLine(1, "", (), remark=earlier)


def trial_results(lineage: Lineage, trial: Run) -> tuple[str, str]:
    """Returns the scores of a trial's stages, and the reference of its encoder."""
    stages = [run for run in lineage.list_stages(trial) if run.kind != "prepare"]
    numbers = "; ".join(filter(None, (format_scores(group) for group in group_by_stage(stages))))
    first = next((run for run in stages if run.model), None)
    return numbers, lineage.encoder_reference(first) if first else ""


def _recipe_lines(lineage: Lineage, recipe: Run) -> Iterator[RunLine]:
    """Yields one line for each run that makes an encoder, as each has a reference, and one for all seeds else."""
    for group in group_by_stage(lineage.list_stages(recipe)):
        if group[0].kind == "prepare":
            yield RunLine(1, "prepare", tuple(group[:1]), format_image_counts(group[0].metrics))
        elif group[0].artifact == "encoder" or len(group) == 1:
            for run in group:
                yield RunLine(1, run.name, (run,), format_scores([run]), lineage.encoder_reference(run))
        else:
            yield RunLine(1, f"{group[0].stage}, {len(group)} seeds", tuple(group), format_scores(group))


def group_by_stage(runs: Sequence[Run]) -> list[list[Run]]:
    """Returns the runs of each stage, ordered by seed."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.stage, []).append(run)
    return [sorted(group, key=read_seed) for group in groups.values()]


def read_seed(run: Run) -> int:
    """Returns the seed of a stage's run; 0 if it has none."""
    return int(run.params.get("seed", 0))


def runs_table(lineage: Lineage, lines: Sequence[RunLine], width: int) -> Table:
    """Returns a table for a terminal of `width` characters. A narrow one shows start and duration of recipes only."""
    columns = WIDE_COLUMNS if width >= WIDE_TERMINAL else NARROW_COLUMNS
    title = f"{lineage.location.experiment} in {lineage.location.uri}"
    return build_table(columns, _run_rows(lineage, lines, width >= WIDE_TERMINAL), title)


def _run_rows(lineage: Lineage, lines: Sequence[RunLine], wide: bool) -> Iterator[tuple[Text, ...]]:
    for k, line in enumerate(lines):
        if line.depth == 0 and k > 0:
            yield ()
        yield _format_row(lineage, line, wide)


def _format_row(lineage: Lineage, line: RunLine, wide: bool) -> tuple[Text, ...]:
    if line.remark:
        return (Text("  " * line.depth + line.remark, style="dim"),)
    state, start, duration = _joint_state(lineage, line), _format_start(line), _format_elapsed(line)
    times = f"{start}, took {duration}" if duration else start
    results = Text("\n".join(filter(None, ("" if wide or line.depth else times, line.numbers, line.reference))))
    if line.reference:
        results.highlight_words([line.reference], "cyan")
    name = Text("  " * line.depth + line.name, style="bold" if line.depth == 0 else "")
    run_id = line.runs[0].short_id if len(line.runs) == 1 else ""
    first = (name, Text(run_id), Text(state, style=RUN_STATE_STYLES.get(state, "yellow")))
    return (*first, Text(start), Text(duration), results) if wide else (*first, results)


def _joint_state(lineage: Lineage, line: RunLine) -> str:
    """Returns the state of all runs of a line, or e.g. "2/3 done" if they differ."""
    states = [run_state(lineage, run) for run in line.runs]
    if len(set(states)) == 1:
        return states[0]
    return f"{states.count('finished')}/{len(states)} done"


def _format_start(line: RunLine) -> str:
    return format_ago(time.time() - max(run.start for run in line.runs))


def elapsed_seconds(run: Run) -> float | None:
    """Returns the seconds of work of a run, or else from its start to its end; None if it has not ended."""
    return None if run.end is None else run.metrics.get(SECONDS_METRIC, run.end - run.start)


def _format_elapsed(line: RunLine) -> str:
    known = [seconds for run in line.runs if (seconds := elapsed_seconds(run)) is not None]
    return format_duration(sum(known)) if known else ""


def runs_tsv(lineage: Lineage, lines: Sequence[RunLine]) -> str:
    """Returns a heading and a line of tab-separated cells for each run, the seeds of a stage one by one."""
    rows = [_tsv_row(lineage, line, run) for line in lines for run in line.runs]
    return format_tsv([TSV_HEADINGS, *rows])


def _tsv_row(lineage: Lineage, line: RunLine, run: Run) -> tuple[str, ...]:
    seconds = elapsed_seconds(run)
    start = datetime.datetime.fromtimestamp(run.start, datetime.UTC).isoformat(timespec="seconds")
    numbers = line.numbers if len(line.runs) == 1 else format_scores([run])
    reference = lineage.encoder_reference(run, short=False) or line.reference
    duration = "" if seconds is None else f"{seconds:.1f}"
    return run.kind, run.name, run.id, run_state(lineage, run), start, duration, numbers, reference
