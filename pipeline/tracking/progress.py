"""Progress of stages: a thread of the driver follows the metrics files of the workers, and logs new rows to MLflow."""

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

from firstlight.pipeline.records import DamagedRecord, parse_json_rows
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.terminal import escape_line
from firstlight.pipeline.tracking.retry import describe_failure

POLL_S = 0.5
# The seconds between the lines that are printed if stdout is not a terminal.
LINE_INTERVAL_S = 20.0
# MLflow gets new rows as soon as sending the last ones is this share of the time since, at the latest after
# SEND_INTERVAL_S: a write takes Python's global lock from a training in the same process.
SEND_SHARE, SEND_INTERVAL_S = 0.05, 10.0

JsonRows = list[dict[str, Any]]
# Called with an instance, the share of its stage that is done (0..1, over all seeds), and new rows of the instance.
ProgressListener = Callable[[StageInstance, float, JsonRows], None]


@dataclass
class FollowedFile:
    """One metrics file, and what was read of it.

    `logged` is the last step that MLflow has, and `pending` are later rows that it does not have yet. `last` is the
    line that ends at `offset`. `share_done` is in 0..1. The listener gets no rows of a file without an `instance`.
    """

    file: Path
    label: str
    log: Callable[[JsonRows], None]
    logged: int = -1
    offset: int = 0
    last: bytes = b""
    share_done: float = 0.0
    notes: set[str] = field(default_factory=set)
    problem: str = ""
    pending: JsonRows = field(default_factory=list)
    instance: StageInstance | None = None

    def read_new_rows(self) -> JsonRows:
        """Returns the rows appended since the last call, or all rows if a resumed worker has truncated the file."""
        # It needs torch, and a `ProgressCounter` is shown before that is imported.
        from firstlight.pipeline.train.metrics import METRICS_SHAPE

        try:
            with open(self.file, "rb") as file:
                file.seek(self.offset - len(self.last))
                # The file was truncated, and maybe grew beyond this offset again.
                if file.read(len(self.last)) != self.last:
                    self.offset, self.last = file.seek(0), b""
                data = file.read()
        except OSError:
            # It does not exist yet, or the storage was deleted: the worker says so.
            return []
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.splitlines(keepends=True)
        self.offset, self.last = self.offset + len(whole), lines[-1] if lines else self.last
        rows = []
        for line in lines:
            try:
                rows += parse_json_rows(line, METRICS_SHAPE, str(self.file))
            except DamagedRecord as error:
                rows.append({"note": f"a row was left out: {error}"})
        return rows

    def queue_rows(self, rows: JsonRows) -> None:
        """Queues rows for MLflow, without those of steps that a resumed worker has repeated."""
        new = [row for row in rows if row["step"] > self.logged]
        if new:
            self.logged = new[-1]["step"]
            self.pending += new

    def send_rows(self) -> None:
        """Logs the pending rows to MLflow. If that fails, they stay pending: an outage does not stop a training."""
        if not self.pending:
            return
        try:
            self.log(self.pending)
        except Exception as error:
            self.problem = describe_failure(error)
            return
        self.pending, self.problem = [], ""


class ProgressCounter:
    """Shows the progress of work that counts images: `with ProgressCounter(...) as c: c.show_count(done, total)`."""

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
        self.started = self.printed_at = time.monotonic()

    def __enter__(self) -> "ProgressCounter":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        if not self.console.is_terminal and self.seen and kind is None:
            text = f"{self.title}: {self.seen:,} images{self.remark} in {time.monotonic() - self.started:.0f} s"
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def show_count(self, done: int, total: int) -> None:
        """Shows that `done` of `total` images are done."""
        self.seen = done
        rate = done / max(time.monotonic() - self.started, 1e-9)
        self.progress.update(self.task, completed=done, total=total, rate=f"{rate:,.0f} images/s")
        if not self.console.is_terminal and done < total and time.monotonic() - self.printed_at > LINE_INTERVAL_S:
            self.printed_at = time.monotonic()
            left = (total - done) / max(rate, 1e-9)
            text = f"{self.title}: {done:,} of {total:,} images  {rate:,.0f} images/s  about {left:.0f} s left"
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class ProgressFollower:
    """Shows one progress line for several metrics files, and logs their rows: `with ProgressFollower(...): ...`.

    `listener` is called with new rows.
    """

    def __init__(
        self, console: Console, title: str, files: Sequence[FollowedFile], listener: ProgressListener | None = None
    ) -> None:
        self.console, self.title, self.files, self.listener = console, title, files, listener
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._poll_files, daemon=True, name="follow")
        self.printed_at = self.next_send = time.monotonic()
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

    def __enter__(self) -> "ProgressFollower":
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
        self._read_files()
        self._send_rows()
        for followed in self.files:
            if followed.pending:
                self._print_note(
                    followed,
                    f"{len(followed.pending)} rows are not in MLflow yet ({followed.problem}): {followed.file}",
                )
        if kind is None:
            self.progress.update(self.task, completed=max(len(self.files), 1))
        self.progress.stop()
        if not self.console.is_terminal:
            state = "done" if kind is None else "stopped"
            text = f"{self.title}: {state} after {time.monotonic() - self.started:.0f} s"
            self.console.print(f"{text}{', ' + self.status if self.status else ''}", soft_wrap=True)

    def _poll_files(self) -> None:
        while not self.stopped.wait(POLL_S):
            self._read_files()
            if time.monotonic() >= self.next_send:
                self._send_rows()

    def _send_rows(self) -> None:
        started = time.monotonic()
        for followed in self.files:
            followed.send_rows()
        taken = time.monotonic() - started
        self.next_send = started + min(taken / SEND_SHARE, SEND_INTERVAL_S)

    def _read_files(self) -> None:
        for followed in self.files:
            rows = followed.read_new_rows()
            for row in rows:
                if "note" in row and row["note"] not in followed.notes:
                    followed.notes.add(row["note"])
                    self._print_note(followed, row["note"])
            steps = [row for row in rows if "step" in row]
            if steps:
                self._show_progress(followed, steps[-1])
                if self.listener and followed.instance:
                    self.listener(followed.instance, sum(f.share_done for f in self.files) / len(self.files), steps)
            followed.queue_rows([row for row in steps if "loss" in row])

    def _print_note(self, followed: FollowedFile, text: str) -> None:
        self.console.print(f"[yellow]note[/] {followed.label}: {escape(escape_line(text))}", soft_wrap=True)

    def _show_progress(self, followed: FollowedFile, row: dict[str, Any]) -> None:
        followed.share_done = row["step"] / row["of"]
        parts = [followed.label, f"{row['images_per_s']:,.0f} images/s"]
        parts += [f"loss {row['loss']:.4f}"] if "loss" in row else []
        self.status = "  ".join(parts)
        self.progress.update(self.task, completed=sum(f.share_done for f in self.files), status=self.status)
        if not self.console.is_terminal and time.monotonic() - self.printed_at > LINE_INTERVAL_S:
            self.printed_at = time.monotonic()
            share = sum(f.share_done for f in self.files) / len(self.files)
            left = (time.monotonic() - self.started) * (1 - share) / max(share, 1e-6)
            self.console.print(
                f"{self.title}: {share:.0%}  {self.status}  about {left:.0f} s left", highlight=False, soft_wrap=True
            )
