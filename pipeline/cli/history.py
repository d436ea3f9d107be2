"""`firstlight runs`: what was run, as a table on a terminal and as lines in a pipe."""

import datetime
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from firstlight.pipeline.cli.scores import images, told
from firstlight.pipeline.files import LOCK_FILE, find_lock_owner
from firstlight.pipeline.tracking.lineage import Lineage, Run

STATES = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped", "RUNNING": "running", "SCHEDULED": "waiting"}
STYLES = {"finished": "green", "failed": "red", "stopped": "yellow", "running": "cyan"}
TRIALS = 10  # of a search that are listed; `firstlight show` has all
HEADINGS = ("run", "id", "state", "when", "took", "numbers, and what a recipe can take")
WIDE = 110  # columns of a terminal that have room for all of them


@dataclass(frozen=True)
class Line:
    """One run, or the seeds of a stage together; `depth`: how far below a recipe or search."""

    depth: int
    name: str
    runs: tuple[Run, ...]
    numbers: str = ""
    reference: str = ""
    more: str = ""  # in place of all else


def state(lineage: Lineage, run: Run) -> str:
    """As MLflow has it; a run that nobody works at any more, as its process was killed, is `stopped`."""
    said = STATES.get(run.status, run.status.lower())
    if said != "running":
        return said
    recipe = run if run.whole else lineage.recipe(run)
    folder = lineage.records.storage / (recipe.name if recipe else "")
    return "stopped" if (folder / LOCK_FILE).is_file() and find_lock_owner(folder) is None else said


def lines(lineage: Lineage, name: str = "", limit: int | None = None) -> Iterator[Line]:
    """Recipes and searches whose name has `name` in it, the newest first, and what is below each."""
    tops = [run for run in lineage.tops() if name.lower() in run.name.lower()]
    for top in tops[:limit]:
        yield Line(0, f"{top.name} ({top.kind})" if top.kind != "recipe" else top.name, (top,))
        if top.kind == "search":
            yield from _of_search(lineage, top)
        else:
            yield from _of_recipe(lineage, top)
    if limit is not None and len(tops) > limit:
        yield Line(0, "", (), more=f"and {len(tops) - limit} earlier: --limit {len(tops)}")


def _of_search(lineage: Lineage, search: Run) -> Iterator[Line]:
    trials = lineage.trials(search)
    for trial in trials[-TRIALS:]:
        numbers = "; ".join(
            filter(None, (told(group) for group in by_stage([r for r in lineage.stages(trial) if r.kind != "prepare"])))
        )
        first = next((run for run in lineage.stages(trial) if run.model), None)
        yield Line(1, trial.name, (trial,), numbers, lineage.reference(first) if first else "")
    if len(trials) > TRIALS:
        yield Line(1, "", (), more=f"and {len(trials) - TRIALS} trials before: firstlight show {search.short}")


def _of_recipe(lineage: Lineage, recipe: Run) -> Iterator[Line]:
    """Pretrainings one by one, as each has a reference; the seeds of other stages together."""
    for group in by_stage(lineage.stages(recipe)):
        if group[0].kind == "prepare":
            yield Line(1, "prepare", tuple(group[:1]), images(group[0].metrics))
        elif group[0].kind == "pretrain" or len(group) == 1:
            for run in group:
                yield Line(1, run.name, (run,), told([run]), lineage.reference(run))
        else:
            yield Line(1, f"{group[0].stage}, {len(group)} seeds", tuple(group), told(group))


def by_stage(runs: Sequence[Run]) -> list[list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.stage, []).append(run)
    return [sorted(group, key=_seed) for group in groups.values()]


def _seed(run: Run) -> int:
    return int(run.params.get("seed", 0))


def table(lineage: Lineage, shown: Sequence[Line], width: int) -> Table:
    """For a terminal of `width` columns; on a narrow one, when a run was is told of recipes only."""
    title = f"{lineage.records.experiment} in {lineage.records.uri}"
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left")
    headings = [heading for heading in HEADINGS if width >= WIDE or heading not in ("when", "took")]
    for heading in headings:
        fixed = heading in ("id", "state", "when", "took")
        out.add_column(
            heading,
            no_wrap=fixed,
            justify="right" if heading == "took" else "left",
            overflow="fold",
            min_width=17 if heading == "run" else 0,
        )
    for line in shown:
        if line.depth == 0 and out.row_count:
            out.add_row()
        cells = _cells(lineage, line, width >= WIDE)
        out.add_row(*(cells[heading] for heading in headings if heading in cells))
    return out


def _cells(lineage: Lineage, line: Line, wide: bool) -> dict[str, Text]:
    """By heading."""
    if line.more:
        return {HEADINGS[0]: Text("  " * line.depth + line.more, style="dim")}
    found = _state(lineage, line)
    times = "" if wide or line.depth else f"{_when(line)}, took {_took(line)}" if _took(line) else _when(line)
    what = Text("\n".join(filter(None, (times, line.numbers, line.reference))))
    if line.reference:
        what.highlight_words([line.reference], "cyan")
    name = Text("  " * line.depth + line.name, style="bold" if line.depth == 0 else "")
    shown_id = line.runs[0].short if len(line.runs) == 1 else ""
    cells = (
        name,
        Text(shown_id),
        Text(found, style=STYLES.get(found, "yellow")),
        Text(_when(line)),
        Text(_took(line)),
        what,
    )
    return dict(zip(HEADINGS, cells, strict=True))


def _state(lineage: Lineage, line: Line) -> str:
    states = [state(lineage, run) for run in line.runs]
    if len(set(states)) == 1:
        return states[0]
    return f"{states.count('finished')}/{len(states)} done"


def _when(line: Line) -> str:
    return ago(time.time() - max(run.start for run in line.runs))


def ago(seconds: float) -> str:
    """How long ago, in the largest unit that has at least two of it."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def took(run: Run) -> float | None:
    """Seconds; None: it has not ended."""
    return None if run.end is None else run.end - run.start


def _took(line: Line) -> str:
    known = [seconds for run in line.runs if (seconds := took(run)) is not None]
    return long(max(known)) if known else ""


def long(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def plain(lineage: Lineage, shown: Sequence[Line]) -> str:
    """A line of tab-separated cells for each run: what it is, its name and id, state, start, seconds, numbers, reference."""
    rows = [("kind", "name", "id", "state", "start", "seconds", "numbers", "reference")]
    for line in shown:
        for run in line.runs:
            seconds = took(run)
            start = datetime.datetime.fromtimestamp(run.start, datetime.UTC).isoformat(timespec="seconds")
            numbers = line.numbers if len(line.runs) == 1 else told([run])
            reference = lineage.reference(run, short=False) or line.reference
            rows.append(
                (
                    run.kind,
                    run.name,
                    run.id,
                    state(lineage, run),
                    start,
                    "" if seconds is None else f"{seconds:.1f}",
                    numbers,
                    reference,
                )
            )
    return "\n".join("\t".join(row) for row in rows)
