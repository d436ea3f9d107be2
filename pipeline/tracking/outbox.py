"""An outbox that queues what is to be published while MLflow is unreachable."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape

from firstlight.pipeline.errors import StageFailed
from firstlight.pipeline.terminal import escape_line
from firstlight.pipeline.tracking.retry import TrackingUnavailable

# The time that a recipe waits for MLflow at its end, and the pause between its attempts.
FLUSH_TIMEOUT_S = 60.0
FLUSH_POLL_S = 3.0


class Unpublished(StageFailed):
    """The stages have finished, but MLflow does not have all results. `rows` are those of the results table."""

    rows: tuple[Any, ...] = ()


class Outbox:
    """Ordered queue of uploads. If MLflow is unreachable, uploads are retried later from the files on disk."""

    def __init__(self, uri: str, console: Console) -> None:
        self.uri, self.console = uri, console
        self.waiting: dict[str, Callable[[], None]] = {}
        self.problem = ""

    def put(self, label: str, publish: Callable[[], None]) -> None:
        """Queues an upload, and tries all that wait. `publish` may be called again after it has failed half-way."""
        self.waiting[label] = publish
        self.publish_waiting()

    def publish_waiting(self) -> None:
        """Tries the waiting uploads in their order, up to the first that fails."""
        published = []
        for label, publish in list(self.waiting.items()):
            try:
                publish()
            except TrackingUnavailable as error:
                self.note_outage(str(error))
                return
            del self.waiting[label]
            published.append(label)
        if self.problem and published:
            self._print_note(f"MLflow at {self.uri} is reachable again, and has {', '.join(published)}")
            self.problem = ""

    def note_outage(self, problem: str) -> None:
        """Prints a note, once for each outage."""
        if not self.problem:
            self._print_note(
                f"MLflow at {self.uri} is unreachable ({problem}): the work goes on, "
                "its results are kept on disk and published later"
            )
        self.problem = problem

    def flush(self) -> None:
        """Publishes what waits, for at most FLUSH_TIMEOUT_S seconds.

        Raises:
            Unpublished: MLflow stayed unreachable; names `tracking.uri` and what is not published.
        """
        end = time.monotonic() + FLUSH_TIMEOUT_S
        self.publish_waiting()
        if self.waiting:
            self._print_note(f"waiting up to {FLUSH_TIMEOUT_S:.0f} s for MLflow, to publish {', '.join(self.waiting)}")
        while self.waiting and time.monotonic() < end:
            time.sleep(FLUSH_POLL_S)
            self.publish_waiting()
        if self.waiting:
            what = f"{len(self.waiting)} of its results are on disk and not published ({', '.join(self.waiting)})"
            advice = "run the same command again to publish them"
            raise Unpublished(f"tracking.uri: {self.uri!r} is unreachable ({self.problem}): {what}; {advice}")

    def _print_note(self, text: str) -> None:
        self.console.print(f"[yellow]note[/] {escape(escape_line(text))}", highlight=False, soft_wrap=True)
