"""A search as it is seen in the terminal: a table of its trials that lives, quiet lines in logs and CI; and the table at the end."""

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

from firstlight.pipeline.report.html_page import duration
from firstlight.pipeline.search.ledger import Trial
from firstlight.pipeline.search.objectives import Objective
from firstlight.pipeline.search.space import Search

QUIET_S = 30.0  # without a terminal: a line so often
AROUND = 8  # lines of the terminal that a living table leaves to others
STYLES = {"running": "cyan", "done": "green", "stopped": "yellow", "failed": "red"}


def short(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key by its last part, or by as many more as tell it from the others."""
    out = {}
    for key in keys:
        parts, count = key.split("."), 1
        while any(other != key and other.split(".")[-count:] == parts[-count:] for other in keys):
            count += 1
        out[key] = ".".join(parts[-count:])
    return out


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def ranked(trials: Sequence[Trial], objective: Objective) -> list[Trial]:
    """Best first; then those that were stopped, by how far they came, and those that failed."""
    order = ("done", "running", "stopped", "failed")

    def key(trial: Trial) -> tuple[float, ...]:
        by = -objective.sign * trial.means[0] if trial.state == "done" else -(trial.seen[-1][0] if trial.seen else 0.0)
        return order.index(trial.state), by, trial.number

    return sorted(trials, key=key)


def table(search: Search, trials: Sequence[Trial]) -> Table:
    """Of all trials, best first."""
    title = f"{search.name}: {len(trials)} trials, on held-out images, best first"
    out, names = Table(title=title, title_justify="left"), short(list(search.space))
    out.add_column("trial", justify="right", no_wrap=True)
    out.add_column("state", no_wrap=True)
    for key in search.space:
        out.add_column(names[key], justify="right")
    for objective in search.objectives:
        out.add_column(f"{objective.measure} ({objective.mode})", justify="right")
    out.add_column("time", justify="right", no_wrap=True)
    if any(trial.reason for trial in trials):
        out.add_column("why")
    for trial in ranked(trials, search.objectives[0]):
        scores = [spread(scores) for scores in trial.scores] or [""] * len(search.objectives)
        why = [escape(trial.reason)] if any(t.reason for t in trials) else []
        state = f"[{STYLES[trial.state]}]{trial.state}[/]"
        out.add_row(
            trial.name,
            state,
            *(shown(trial.values[key]) for key in search.space),
            *scores,
            f"{trial.seconds:.0f} s",
            *why,
        )
    return out


def closing(search: Search, trials: Sequence[Trial], best: Trial, promoted: str | None) -> Group:
    """The table, and what was best."""
    lines: list[Any] = [table(search, trials)]
    with_ = _settings(search, best.values)
    lines.append(Text(f"best: trial {best.name}: {with_}"))
    lines += [
        Text(f"  its networks had, up to {epochs} epochs: {_settings(search, values)}")
        for epochs, values in best.before
    ]
    if len(search.objectives) > 1:
        names = ", ".join(trial.name for trial in front(search, [trial for trial in trials if trial.state == "done"]))
        lines.append(Text(f"no trial betters these in all objectives: {names} (the first objective has decided)"))
    if promoted:
        lines.append(Text(f"its encoder is {promoted}: stages.<stage>.encoder={promoted} takes it"))
    return Group(*lines)


def _settings(search: Search, values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={shown(values[key])}" for key in search.space)


def front(search: Search, done: Sequence[Trial]) -> list[Trial]:
    """The trials that no other betters in one objective without being worse in another (the Pareto set)."""
    table_ = np.asarray(
        [[o.sign * mean for o, mean in zip(search.objectives, trial.means, strict=True)] for trial in done]
    )
    bettered = [bool(((table_ >= row).all(1) & (table_ > row).any(1)).any()) for row in table_]
    return [trial for trial, worse in zip(done, bettered, strict=True) if not worse]


def spread(scores: Sequence[float]) -> str:
    mean = f"{np.mean(scores):.4g}"
    return f"{mean} ± {np.std(scores, ddof=1):.2g}" if len(scores) > 1 else mean


class View:
    """`with view: ...` shows the table while trials run."""

    def __init__(self, console: Console, search: Search) -> None:
        self.console, self.search = console, search
        self.names = short(list(search.space))
        self.trials: dict[int, Trial] = {}
        self.reports: dict[int, dict[str, Any]] = {}
        self.begun: dict[int, tuple[float, float]] = {}  # of a trial in this command: when, and how far it was
        self.started, self.told = time.monotonic(), time.monotonic()
        self.live = Live(console=console, get_renderable=self.__rich__, refresh_per_second=2, transient=True)

    def __enter__(self) -> "View":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def start(self, left: int, at_once: int) -> None:
        self.started = time.monotonic()
        self.note(f"{left} trials, {at_once} at a time", style="bold")

    def note(self, text: str, style: str = "yellow") -> None:
        word = "note" if style == "yellow" else self.search.name
        self.console.print(f"[{style}]{word}[/] {escape(text)}", highlight=False, soft_wrap=True)

    def know(self, trial: Trial) -> None:
        self.trials[trial.number] = trial

    def report(self, trial: Trial, report: dict[str, Any]) -> None:
        self.begun.setdefault(trial.number, (time.monotonic(), report.get("progress", 0.0)))
        self.reports[trial.number] = report
        if not self.console.is_terminal and time.monotonic() - self.told > QUIET_S:
            self.told = time.monotonic()
            self.console.print(f"{self.search.name}: {self._summary()}", highlight=False, markup=False, soft_wrap=True)

    def exchanged(self, trial: Trial) -> None:
        """A trial of a population goes on from the networks of another."""
        with_ = ", ".join(f"{self.names[key]} {shown(value)}" for key, value in trial.values.items())
        self.note(
            f"trial {trial.name} goes on from trial {trial.origin:03d} at {trial.parts[-1].epochs} epochs, with {with_}"
        )

    def ended(self, trial: Trial) -> None:
        self.reports.pop(trial.number, None)
        self.told = time.monotonic()
        measured = ", ".join(
            f"{o.measure} {spread(scores)}" for o, scores in zip(self.search.objectives, trial.scores, strict=False)
        )
        with_ = ", ".join(f"{self.names[key]} {shown(value)}" for key, value in trial.values.items())
        what = f"{trial.state} after {trial.seconds:.0f} s: {measured or trial.reason}"
        if not self.console.is_terminal or trial.state == "failed":
            told = f"trial {trial.name} {escape(what)}  [dim]{escape(f'({with_})')}[/]"
            self.console.print(told, highlight=False, soft_wrap=True, style="red" if trial.state == "failed" else None)

    def _summary(self) -> str:
        counts = [f"{n} {state}" for state in STYLES if (n := sum(t.state == state for t in self.trials.values()))]
        best = next(
            (t for t in ranked(list(self.trials.values()), self.search.objectives[0]) if t.state == "done"), None
        )
        told = (
            f", best trial {best.name} with {self.search.objectives[0].measure} {spread(best.scores[0])}"
            if best
            else ""
        )
        left = self._seconds_left()
        return f"{', '.join(counts)} of {self.search.total}{told}{f', about {duration(left)} left' if left else ''}"

    def _seconds_left(self) -> float | None:
        """Of the whole search: at the rate of this command, what is left of the trials that were begun, and those that are still to come."""
        reached = {
            n: 1.0 if trial.state != "running" else self.reports.get(n, {}).get("progress", 0.0)
            for n, trial in self.trials.items()
        }
        made = sum(reached[n] - before for n, (_, before) in self.begun.items())
        if made < 0.2:
            return None
        return float((time.monotonic() - self.started) / made * max(self.search.total - sum(reached.values()), 0.0))

    def _left(self, trial: Trial) -> str:
        report, begun = self.reports.get(trial.number), self.begun.get(trial.number)
        if report is None or begun is None or report.get("progress", 0.0) - begun[1] < 0.02:
            return ""
        rate = (report["progress"] - begun[1]) / max(time.monotonic() - begun[0], 1e-9)
        return duration((1.0 - report["progress"]) / rate)

    def __rich__(self) -> Table:
        out = Table(title=f"{self.search.name}: {self._summary()}", title_justify="left", caption_justify="left")
        for heading in ("trial", "state", *self.names.values(), self.search.objectives[0].measure, "progress", "left"):
            out.add_column(heading, justify="left" if heading in ("state", "progress") else "right", no_wrap=True)
        for trial in self._seen():
            report = self.reports.get(trial.number, {})
            score = spread(trial.scores[0]) if trial.scores else f"[dim]{escape(str(report.get('so_far', '')))}[/]"
            doing = (
                "waits"
                if trial.resting
                else report.get("stage", trial.state)
                if trial.state == "running"
                else trial.state
            )
            state = f"[{STYLES[trial.state]}]{doing}[/]"
            bar = (
                ProgressBar(total=1.0, completed=report.get("progress", 0.0), width=16)
                if trial.state == "running"
                else f"{trial.seconds:.0f} s"
            )
            left = self._left(trial) if trial.state == "running" else ""
            out.add_row(trial.name, state, *(shown(trial.values[key]) for key in self.names), score, bar, left)
        return out

    def _seen(self) -> list[Trial]:
        """Those that run, then the best of the others, as many as the terminal has lines for."""
        trials = list(self.trials.values())
        running = [trial for trial in trials if trial.state == "running"]
        others = [trial for trial in ranked(trials, self.search.objectives[0]) if trial.state != "running"]
        return (running + others)[: max(self.console.height - AROUND, 3)]
