"""Progress: a thread of the driver reads what the workers append to their metrics files, shows it, and hands new rows on to MLflow."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.retry import reason

POLL_S = 0.5
QUIET_S = 20.0  # without a terminal: a line so often

Rows = list[dict[str, Any]]
# Called with an instance, the share of its stage that is done (0..1, over all seeds), and the new rows of the instance.
Listener = Callable[[StageInstance, float, Rows], None]


@dataclass
class Followed:
    """One metrics file. Rows up to `logged` are in MLflow already."""

    file: Path
    label: str
    log: Callable[[Rows], None]
    logged: int = -1
    offset: int = 0
    last: bytes = b""  # the line that ends at `offset`
    done: float = 0.0  # share of its steps
    notes: set[str] = field(default_factory=set)
    problem: str = ""
    pending: Rows = field(default_factory=list)  # not in MLflow yet: it is down, or was a moment ago
    # What the file belongs to. The listener gets no rows of a file without it.
    instance: StageInstance | None = None

    def fresh(self) -> Rows:
        """The whole lines that were appended since the last call (all of them, when the file was cut back by a resumed worker)."""
        try:
            with open(self.file, "rb") as file:
                file.seek(self.offset - len(self.last))
                if file.read(len(self.last)) != self.last:  # cut back, and maybe grown past this place again since
                    self.offset, self.last = file.seek(0), b""
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.splitlines(keepends=True)
        self.offset, self.last = self.offset + len(whole), lines[-1] if lines else self.last
        rows = []
        for line in lines:
            with contextlib.suppress(ValueError):  # half a row of a killed worker
                rows.append(json.loads(line))
        return rows

    def keep(self, rows: Rows) -> None:
        """Rows for MLflow; steps that a resumed worker made again are there already."""
        new = [row for row in rows if row["step"] > self.logged]
        if new:
            self.logged = new[-1]["step"]
            self.pending += new

    def hand_on(self) -> None:
        """Training does not stop because MLflow is away: what it refuses now is offered again."""
        if not self.pending:
            return
        try:
            self.log(self.pending)
        except Exception as error:
            self.problem = reason(error)
            return
        self.pending, self.problem = [], ""


class Counted:
    """Progress of work that counts itself: `with Counted(console, title) as counted: ... counted.advance(done, total)`."""

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title, self.seen, self.remark = console, title, 0, ""
        columns = (
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("images  {task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(compact=True),
        )
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task(title, total=None, rate="")
        self.started = self.shown = time.monotonic()

    def __enter__(self) -> "Counted":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        if not self.console.is_terminal and self.seen and kind is None:
            told = f"{self.title}: {self.seen:,} images{self.remark} in {time.monotonic() - self.started:.0f} s"
            self.console.print(told, highlight=False, markup=False, soft_wrap=True)

    def advance(self, done: int, total: int) -> None:
        self.seen = done
        rate = done / max(time.monotonic() - self.started, 1e-9)
        self.progress.update(self.task, completed=done, total=total, rate=f"{rate:,.0f} images/s")
        if not self.console.is_terminal and done < total and time.monotonic() - self.shown > QUIET_S:
            self.shown = time.monotonic()
            told = f"{self.title}: {done:,} of {total:,} images  {rate:,.0f} images/s  about {(total - done) / max(rate, 1e-9):.0f} s left"
            self.console.print(told, highlight=False, markup=False, soft_wrap=True)


class Follow:
    """`with Follow(console, title, files): ...` shows one progress line for all the files together; `listener` is told as well."""

    def __init__(
        self, console: Console, title: str, files: Sequence[Followed], listener: Listener | None = None
    ) -> None:
        self.console, self.title, self.files, self.listener = console, title, files, listener
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._loop, daemon=True, name="follow")
        self.shown = time.monotonic()
        self.status = ""
        columns = (
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(compact=True),
        )
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task(title, total=max(len(files), 1), status="starting")

    def __enter__(self) -> "Follow":
        self.started = time.monotonic()
        self.progress.start()
        if not self.console.is_terminal:
            self.console.print(f"{self.title}: started")
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopped.set()
        self.thread.join()
        self._look()
        for followed in self.files:
            if followed.pending:
                self._note(
                    followed,
                    f"{len(followed.pending)} rows are not in MLflow yet ({followed.problem}): {followed.file}",
                )
        if kind is None:
            self.progress.update(self.task, completed=max(len(self.files), 1))
        self.progress.stop()
        if not self.console.is_terminal:
            state = "done" if kind is None else "stopped"
            self.console.print(
                f"{self.title}: {state} after {time.monotonic() - self.started:.0f} s{', ' + self.status if self.status else ''}",
                soft_wrap=True,
            )

    def _loop(self) -> None:
        while not self.stopped.wait(POLL_S):
            self._look()

    def _look(self) -> None:
        for followed in self.files:
            rows = followed.fresh()
            for row in rows:
                if "note" in row and row["note"] not in followed.notes:
                    followed.notes.add(row["note"])
                    self._note(followed, row["note"])
            steps = [row for row in rows if "step" in row]
            if steps:
                self._show(followed, steps[-1])
                if self.listener and followed.instance:
                    self.listener(followed.instance, sum(f.done for f in self.files) / len(self.files), steps)
            followed.keep([row for row in steps if "loss" in row])
            followed.hand_on()

    def _note(self, followed: Followed, text: str) -> None:
        self.console.print(f"[yellow]note[/] {followed.label}: {escape(text)}", soft_wrap=True)

    def _show(self, followed: Followed, row: dict[str, Any]) -> None:
        followed.done = row["step"] / row["of"]
        parts = [followed.label, f"{row['images_per_s']:,.0f} images/s"]
        parts += [f"loss {row['loss']:.4f}"] if "loss" in row else []
        self.status = "  ".join(parts)
        self.progress.update(self.task, completed=sum(f.done for f in self.files), status=self.status)
        if not self.console.is_terminal and time.monotonic() - self.shown > QUIET_S:
            self.shown = time.monotonic()
            share = sum(f.done for f in self.files) / len(self.files)
            left = (time.monotonic() - self.started) * (1 - share) / max(share, 1e-6)
            self.console.print(
                f"{self.title}: {share:.0%}  {self.status}  about {left:.0f} s left", highlight=False, soft_wrap=True
            )
