"""The blocks of a search's report: the best trial, warnings, the table of trials, and what was searched."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.report import data_notes
from firstlight.pipeline.report.html_page import (
    Block,
    Cell,
    Facts,
    Fold,
    Table,
    Text,
    Tone,
    strip_credentials,
)
from firstlight.pipeline.report.page_parts import (
    REPORT_FILE,
    SUMMARY_FOLDER,
    error_blocks,
    figure_blocks,
    score_blocks,
    warning_blocks,
)
from firstlight.pipeline.search.ledger import OTHER_CODE_NOTE, SearchState, Trial
from firstlight.pipeline.search.plan import SearchPlan
from firstlight.pipeline.search.progress import (
    format_mean_std,
    format_value,
    pareto_front,
    rank_trials,
    shorten_keys,
)
from firstlight.pipeline.search.space import Dimension
from firstlight.pipeline.stages.code_version import code_version
from firstlight.pipeline.stages.score_rows import ScoreRow
from firstlight.pipeline.terminal import format_duration

# The folder of the recipe's run with the best setting.
BEST_FOLDER = "best"
# A best value within this share of a range from its end counts as being at the end.
RANGE_EDGE = 0.03
STATE_TONES: dict[str, Tone] = {"done": "good", "stopped": "unsure", "running": "unsure", "failed": "bad"}


@dataclass(frozen=True)
class SearchReport:
    """All facts that the report of a search is written from."""

    plan: SearchPlan
    state: SearchState
    store: Store
    # The MLflow run of the search, and where MLflow is.
    run_id: str
    uri: str
    best: Trial | None = None
    promoted: str | None = None
    # The recipe that was run with the best setting, and the rows of its table.
    retrained: Recipe | None = None
    rows: tuple[ScoreRow, ...] = ()
    # Why the search ended before its end.
    error: str | None = None

    @property
    def names(self) -> dict[str, str]:
        """The short names of the searched keys."""
        return shorten_keys(list(self.plan.search.space))

    @property
    def done(self) -> list[Trial]:
        return self.state.trials_in("done")


def best_blocks(report: SearchReport) -> list[Block]:
    """Returns the error that ended the search, the best trial and, if they exist, the Pareto set and its own run."""
    search, best = report.plan.search, report.best
    blocks = error_blocks(report.error)
    if best is None:
        return [*blocks, Text("No trial has finished.", "quiet")]
    scores = ", ".join(
        f"{objective.measure} {format_mean_std(by_seed)}"
        for objective, by_seed in zip(search.objectives, best.scores, strict=True)
    )
    count = len(report.done)
    blocks.append(Text(f"Trial {best.name} is the best of the {count} finished trials: {scores}, on held-out images."))
    promoted = [("its encoder", report.promoted)] if report.promoted else []
    blocks.append(Facts([*((key, format_value(best.values[key])) for key in search.space), *promoted]))
    blocks += _earlier_settings(report, best)
    if len(search.objectives) > 1:
        front = rank_trials(pareto_front(search, report.done), search.objectives[0])
        text = (
            "The first objective decides which trial is the best. No trial is better than one of these in one "
            "objective without being worse in another:"
        )
        blocks += [Text(text), _trials_table(report, "The Pareto set", front)]
    text = "The best of many trials scores higher on the images that it was selected by than on other images."
    blocks.append(Text(text, "quiet"))
    if report.retrained is not None:
        folder, seeds = report.state.folder / BEST_FOLDER, len(report.retrained.seeds)
        text = f"The full recipe was run with this setting and {seeds} seeds; its own report: {folder / REPORT_FILE}"
        score_tables = score_blocks(report.retrained, report.rows)
        blocks += [Text(text), *score_tables, *figure_blocks(folder / SUMMARY_FOLDER)]
    return blocks


def _earlier_settings(report: SearchReport, best: Trial) -> list[Block]:
    """Returns a table of the settings that the networks of the best trial of a population were trained with before."""
    if not best.before:
        return []
    keys = report.plan.search.space
    rows = [[f"up to {end:,}", *(format_value(values[key]) for key in keys)] for end, values in best.before]
    heads = (best.unit, *report.names.values())
    return [Table("What its networks were trained with before", heads, rows, range(1, len(heads)))]


def warnings_blocks(report: SearchReport, recipe: Recipe) -> list[Block]:
    images = data_notes.describe_problems(recipe, report.store)
    lines = [*report.plan.list_warnings(), *images, *_trial_warnings(report), *warn_at_range_ends(report)]
    return warning_blocks(lines)


def _trial_warnings(report: SearchReport) -> Iterator[str]:
    trials = report.state.trials
    if report.state.has_other_code():
        yield OTHER_CODE_NOTE
    for reason, count in Counter(trial.reason for trial in trials if trial.state == "failed").most_common():
        yield f"{count} trial{'s' if count > 1 else ''} failed: {reason}"
    if report.done and len(report.done[0].scores[0]) == 1:
        yield "each trial has one seed: another seed may change the order of trials with similar scores"


def warn_at_range_ends(report: SearchReport) -> Iterator[str]:
    """Yields a line for each setting whose best value is at an end of what was allowed."""
    best = report.best
    if best is None:
        return
    for key, dimension in report.plan.search.space.items():
        value = best.values[key]
        end = _find_range_end(dimension, value)
        if end is not None:
            yield (
                f"{key}: the best value, {format_value(value)}, is at the {end} end of what was searched; values "
                "beyond it may be better"
            )


def _find_range_end(dimension: Dimension, value: Any) -> str | None:
    """Returns the end of a range, or of three or more listed numbers, that a value is at; None if it is at none."""
    ends = dimension.end_values
    if any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends):
        return None
    if dimension.listed_values and len(ends) < 3:
        return None
    low, high, at = (float(np.log(x) if dimension.loguniform else x) for x in (min(ends), max(ends), value))
    margin = 0.0 if dimension.listed_values else RANGE_EDGE * (high - low)
    return "lower" if at - low <= margin else "upper" if high - at <= margin else None


def trials_blocks(report: SearchReport) -> list[Block]:
    """Returns the table of all trials, best first; [] before the first one begins."""
    trials = rank_trials(report.state.trials, report.plan.search.objectives[0])
    if not trials:
        return []
    counts = ", ".join(f"{count} {state}" for state, count in Counter(trial.state for trial in trials).items())
    seconds = sum(trial.seconds for trial in trials)
    caption = (
        "On held-out images, best first; mean ± standard deviation over seeds where there are several. "
        f"{counts}; {format_duration(seconds)} of work"
    )
    return [_trials_table(report, caption, trials)]


def _trials_table(report: SearchReport, caption: str, trials: Sequence[Trial]) -> Table:
    search = report.plan.search
    has_reasons = any(trial.reason for trial in trials)
    measures = [f"{objective.measure} ({objective.mode})" for objective in search.objectives]
    heads = ["trial", "state", *report.names.values(), *measures, "time", *(["why"] if has_reasons else [])]
    rows: list[list[str | Cell]] = [
        [
            trial.name,
            Cell(trial.state, STATE_TONES[trial.state]),
            *(format_value(trial.values[key]) for key in search.space),
            *([format_mean_std(by_seed) for by_seed in trial.scores] or [""] * len(measures)),
            format_duration(trial.seconds),
            *([trial.reason] if has_reasons else []),
        ]
        for trial in trials
    ]
    return Table(caption, heads, rows, range(2, len(heads) - has_reasons))


def search_blocks(report: SearchReport, recipe: Recipe) -> list[Block]:
    """Returns the space, the facts of the search, and the budget of a trial."""
    search, plan = report.plan.search, report.plan
    options = search.scheduler.model_dump(mode="json", exclude={"name"})
    scheduler = ", ".join(f"{key}: {format_value(value)}" for key, value in options.items())
    concurrency = f", at most {search.concurrency} at a time" if search.concurrency else ""
    facts = [
        ("recipe", f"{recipe.name} ({plan.files.path})"),
        ("stages", f"{', '.join(plan.trial_stages(recipe))}, in each trial"),
        *(
            ("objective", f"{objective.measure}, {'larger' if objective.mode == 'max' else 'smaller'} is better")
            for objective in search.objectives
        ),
        ("algorithm", f"{search.algorithm}, seed {search.seed}"),
        ("scheduler", search.scheduler.name + (f" ({scheduler})" if scheduler else "")),
        ("trials", f"{search.num_trials}{concurrency}"),
        ("seeds", f"{', '.join(map(str, recipe.seeds))}, in each trial"),
        *((f"for {stage}", f"the encoder {reference}") for stage, reference in report.state.references.items()),
        ("code", code_version()),
        ("MLflow", strip_credentials(report.uri)),
        ("files", str(report.state.folder)),
    ]
    space = [[key, *_describe_dimension(dimension)] for key, dimension in search.space.items()]
    blocks: list[Block] = [Table("The space", ("setting", "drawn", "values"), space), Facts(facts)]
    if search.overrides:
        overrides = Facts([(key, format_value(value)) for key, value in search.overrides.items()])
        blocks.append(Fold("The budget of a trial, which replaces values of the recipe", [overrides]))
    return blocks


def _describe_dimension(dimension: Dimension) -> tuple[str, str]:
    (kind,) = dimension.model_dump(exclude_none=True)
    if dimension.listed_values:
        return kind, ", ".join(format_value(value) for value in dimension.listed_values)
    low, high, *step = map(format_value, dimension.range_bounds)
    return kind, f"{low} to {high}" + (f" in steps of {step[0]}" if step else "")
