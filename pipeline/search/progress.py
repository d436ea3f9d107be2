"""A search in the terminal: a live table of its trials, single lines in logs and CI, and the table at the end."""

import json
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from firstlight.pipeline.search.ledger import Trial
from firstlight.pipeline.search.objectives import Objective
from firstlight.pipeline.search.space import Search
from firstlight.pipeline.terminal import escape_line, format_duration

# Seconds between two lines about the whole search, without a terminal.
SUMMARY_INTERVAL_S = 30.0
# Lines of the terminal that the live table leaves free.
RESERVED_LINES = 8
STATE_STYLES = {"running": "cyan", "done": "green", "stopped": "yellow", "failed": "red"}


def shorten_keys(keys: Sequence[str]) -> dict[str, str]:
    """Returns, by dotted key, its last parts: as many as distinguish it from the other keys."""
    short = {}
    for key in keys:
        parts, count = key.split("."), 1
        while any(other != key and other.split(".")[-count:] == parts[-count:] for other in keys):
            count += 1
        short[key] = ".".join(parts[-count:])
    return short


def format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def format_mean_std(scores: Sequence[float]) -> str:
    """Returns the mean of scores and, if there are several, their standard deviation, as `0.875 ± 0.01`."""
    mean = f"{np.mean(scores):.4g}"
    return f"{mean} ± {np.std(scores, ddof=1):.2g}" if len(scores) > 1 else mean


def rank_trials(trials: Sequence[Trial], objective: Objective) -> list[Trial]:
    """Returns the finished trials, best first, then the running, the stopped and the failed ones.

    Trials without a score are ordered by how far they have trained.
    """
    order = ("done", "running", "stopped", "failed")

    def sort_key(trial: Trial) -> tuple[float, ...]:
        reached = trial.seen[-1][0] if trial.seen else 0.0
        rank = -objective.sign * trial.means[0] if trial.state == "done" else -reached
        return order.index(trial.state), rank, trial.number

    return sorted(trials, key=sort_key)


def pareto_front(search: Search, done: Sequence[Trial]) -> list[Trial]:
    """Returns the Pareto set: no other trial is better than one of these in one objective and worse in none."""
    scores = np.asarray(
        [[o.sign * mean for o, mean in zip(search.objectives, trial.means, strict=True)] for trial in done]
    )
    dominated = [bool(((scores >= row).all(1) & (scores > row).any(1)).any()) for row in scores]
    return [trial for trial, is_dominated in zip(done, dominated, strict=True) if not is_dominated]


def build_trials_table(search: Search, trials: Sequence[Trial]) -> Table:
    """Returns a table of all trials, best first."""
    title = f"{search.name}: {len(trials)} trials, on held-out images, best first"
    table, names = Table(title=title, title_justify="left"), shorten_keys(list(search.space))
    table.add_column("trial", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for key in search.space:
        table.add_column(names[key], justify="right")
    for objective in search.objectives:
        table.add_column(f"{objective.measure} ({objective.mode})", justify="right")
    table.add_column("time", justify="right", no_wrap=True)
    has_reasons = any(trial.reason for trial in trials)
    if has_reasons:
        table.add_column("why")
    for trial in rank_trials(trials, search.objectives[0]):
        table.add_row(
            trial.name,
            f"[{STATE_STYLES[trial.state]}]{trial.state}[/]",
            *(format_value(trial.values[key]) for key in search.space),
            *([format_mean_std(scores) for scores in trial.scores] or [""] * len(search.objectives)),
            f"{trial.seconds:.0f} s",
            *([escape(trial.reason)] if has_reasons else []),
        )
    return table


def summarise_search(search: Search, trials: Sequence[Trial], best: Trial, promoted: str | None) -> Group:
    """Returns what is printed at the end: the table, and the best trial."""
    lines: list[Any] = [build_trials_table(search, trials)]
    lines.append(Text(f"best: trial {best.name}: {_format_settings(search, best.values)}"))
    lines += [
        Text(f"  its networks were trained up to {end:,} {best.unit} with: {_format_settings(search, values)}")
        for end, values in best.before
    ]
    if len(search.objectives) > 1:
        front = pareto_front(search, [trial for trial in trials if trial.state == "done"])
        names = ", ".join(trial.name for trial in front)
        lines.append(Text(f"Pareto set over all objectives: trials {names} (the first objective decides the best)"))
    if promoted:
        lines.append(Text(f"its encoder is {promoted}; to use it: stages.<stage>.encoder={promoted}"))
    return Group(*lines)


def _format_settings(search: Search, values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={format_value(values[key])}" for key in search.space)


class TrialTable:
    """Prints the progress of trials. `with table: ...` shows the live table while they run."""

    def __init__(self, console: Console, search: Search) -> None:
        self.console, self.search = console, search
        self.names = shorten_keys(list(search.space))
        self.trials: dict[int, Trial] = {}
        self.reports: dict[int, dict[str, Any]] = {}
        # The time of the first report of each trial of this command, and its progress then.
        self.first_reports: dict[int, tuple[float, float]] = {}
        self.started, self.last_printed = time.monotonic(), time.monotonic()
        self.live = Live(console=console, get_renderable=self.__rich__, refresh_per_second=2, transient=True)

    def __enter__(self) -> "TrialTable":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def print_start(self, left: int, concurrent: int) -> None:
        self.started = time.monotonic()
        self.print_note(f"{left} trials, {concurrent} at a time", style="bold")

    def print_note(self, text: str, style: str = "yellow") -> None:
        word = "note" if style == "yellow" else self.search.name
        self.console.print(f"[{style}]{word}[/] {escape(escape_line(text))}", highlight=False, soft_wrap=True)

    def add_trial(self, trial: Trial) -> None:
        self.trials[trial.number] = trial

    def update_progress(self, trial: Trial, report: dict[str, Any]) -> None:
        """Takes a report of a trial. Without a terminal, prints a line about the whole search from time to time."""
        self.first_reports.setdefault(trial.number, (time.monotonic(), report.get("progress", 0.0)))
        self.reports[trial.number] = report
        if not self.console.is_terminal and time.monotonic() - self.last_printed > SUMMARY_INTERVAL_S:
            self.last_printed = time.monotonic()
            line = f"{self.search.name}: {self._format_summary()}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def print_exchange(self, trial: Trial) -> None:
        """Prints that a trial of a population continues from the networks of another one."""
        self.print_note(
            f"trial {trial.name} continues from trial {trial.origin:03d} at {trial.parts[-1].end:,} {trial.unit}, "
            f"with {self._format_short_settings(trial)}"
        )

    def print_end(self, trial: Trial) -> None:
        """Prints how a trial ended. In a terminal, only failures are printed: the live table shows the others."""
        self.reports.pop(trial.number, None)
        self.last_printed = time.monotonic()
        if self.console.is_terminal and trial.state != "failed":
            return
        scores = ", ".join(
            f"{objective.measure} {format_mean_std(by_seed)}"
            for objective, by_seed in zip(self.search.objectives, trial.scores, strict=False)
        )
        end = escape(f"{trial.state} after {trial.seconds:.0f} s: {scores or trial.reason}")
        line = f"trial {trial.name} {end}  [dim]{escape(f'({self._format_short_settings(trial)})')}[/]"
        style = "red" if trial.state == "failed" else None
        self.console.print(line, highlight=False, soft_wrap=True, style=style)

    def _format_short_settings(self, trial: Trial) -> str:
        return ", ".join(f"{self.names[key]} {format_value(value)}" for key, value in trial.values.items())

    def _format_summary(self) -> str:
        trials, objective = list(self.trials.values()), self.search.objectives[0]
        counts = [f"{n} {state}" for state in STATE_STYLES if (n := sum(t.state == state for t in trials))]
        best = next((trial for trial in rank_trials(trials, objective) if trial.state == "done"), None)
        left = self._seconds_left()
        score = f", best trial {best.name} with {objective.measure} {format_mean_std(best.scores[0])}" if best else ""
        time_left = f", about {format_duration(left)} left" if left else ""
        return f"{', '.join(counts)} of {self.search.num_trials}{score}{time_left}"

    def _seconds_left(self) -> float | None:
        """Returns the seconds until the end of the search, at the speed of this command so far.

        They include the trials that have not begun. Returns None while too little is done to know the speed.
        """
        reached = {
            number: self.reports.get(number, {}).get("progress", 0.0) if trial.state == "running" else 1.0
            for number, trial in self.trials.items()
        }
        # The work is counted in trials, without what earlier commands did.
        done = sum(reached[number] - before for number, (_, before) in self.first_reports.items())
        if done < 0.2:
            return None
        left = max(self.search.num_trials - sum(reached.values()), 0.0)
        return float((time.monotonic() - self.started) / done * left)

    def _time_left(self, trial: Trial) -> str:
        report, first = self.reports.get(trial.number), self.first_reports.get(trial.number)
        if report is None or first is None or report.get("progress", 0.0) - first[1] < 0.02:
            return ""
        rate = (report["progress"] - first[1]) / max(time.monotonic() - first[0], 1e-9)
        return format_duration((1.0 - report["progress"]) / rate)

    def __rich__(self) -> Table:
        title = f"{self.search.name}: {self._format_summary()}"
        table = Table(title=title, title_justify="left", caption_justify="left")
        for heading in ("trial", "state", *self.names.values(), self.search.objectives[0].measure, "progress", "left"):
            justify: Any = "left" if heading in ("state", "progress") else "right"
            table.add_column(heading, justify=justify, no_wrap=True)
        for trial in self._visible_trials():
            table.add_row(*self._trial_cells(trial))
        return table

    def _trial_cells(self, trial: Trial) -> list[Any]:
        report, is_running = self.reports.get(trial.number, {}), trial.state == "running"
        state = "waits" if trial.resting else report.get("stage", trial.state) if is_running else trial.state
        latest = f"[dim]{escape(str(report.get('so_far', '')))}[/]"
        bar = ProgressBar(total=1.0, completed=report.get("progress", 0.0), width=16)
        return [
            trial.name,
            f"[{STATE_STYLES[trial.state]}]{state}[/]",
            *(format_value(trial.values[key]) for key in self.names),
            format_mean_std(trial.scores[0]) if trial.scores else latest,
            bar if is_running else f"{trial.seconds:.0f} s",
            self._time_left(trial) if is_running else "",
        ]

    def _visible_trials(self) -> list[Trial]:
        """Returns the running trials, then the best of the others, as many as fit in the terminal."""
        trials = list(self.trials.values())
        running = [trial for trial in trials if trial.state == "running"]
        others = [trial for trial in rank_trials(trials, self.search.objectives[0]) if trial.state != "running"]
        return (running + others)[: max(self.console.height - RESERVED_LINES, 3)]
