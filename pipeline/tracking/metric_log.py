"""Numbers of runs in MLflow, each of which is logged once, and passed on to the other loggers."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console

from firstlight.pipeline.tracking.loggers.contract import LoggedNumber
from firstlight.pipeline.tracking.loggers.group import LoggerGroup
from firstlight.pipeline.tracking.retry import RetryingClient, short_timeouts

if TYPE_CHECKING:
    from mlflow import MlflowClient

# The most metrics in one request to MLflow.
MAX_METRICS = 1000
# Keys of a row of metrics that are not logged as numbers of their own.
ROW_COUNTERS = ("step", "time", "of", "steps_per_epoch")


class MetricLog:
    """Logs the metrics and the results of runs. `client` retries, `direct_client` does not.

    `loggers`: the names of loggers that get the same numbers. `console`: where they say that one has failed.
    """

    def __init__(
        self, direct_client: "MlflowClient", loggers: Sequence[str] = (), console: Console | None = None
    ) -> None:
        self.direct_client = direct_client
        self.loggers = LoggerGroup(loggers, direct_client, console)
        self.client = cast("MlflowClient", RetryingClient(direct_client))

    def log_missing_metrics(self, run_id: str, rows: Sequence[Mapping[str, Any]], prefix: str = "") -> None:
        """Logs the rows of a training that MLflow does not have, so that each step stays one number of each key.

        Rows are logged in their order, so only the last step that MLflow has may lack some keys. A training that
        resumed before that step has repeated it, with the same numbers at another time.
        """
        last = self.find_last_step(run_id, f"{prefix}loss")
        self.log_metrics(run_id, [row for row in rows if row["step"] > last], prefix)
        for row in rows:
            if row["step"] == last:
                logged = {key for key in row if key in ROW_COUNTERS or self._has_step(run_id, prefix + key, last)}
                missing = {key: value for key, value in row.items() if key not in logged}
                self.log_metrics(run_id, [{**missing, "step": last, "time": row["time"]}], prefix)

    def _has_step(self, run_id: str, key: str, step: int) -> bool:
        return any(metric.step == step for metric in self.client.get_metric_history(run_id, key))

    def log_metrics(self, run_id: str, rows: Sequence[Mapping[str, Any]], prefix: str = "") -> None:
        """Logs rows with `step`, `time` (s) and numbers by name. A row that is logged again stays one row."""
        self._log_rows(self.client, run_id, rows, prefix)

    def log_metrics_once(self, run_id: str, rows: Sequence[Mapping[str, Any]], prefix: str = "") -> None:
        """Logs rows without retries and with short timeouts. Raises whatever MLflow raises."""
        with short_timeouts():
            self._log_rows(self.direct_client, run_id, rows, prefix)

    def _log_rows(self, client: "MlflowClient", run_id: str, rows: Sequence[Mapping[str, Any]], prefix: str) -> None:
        from mlflow.entities import Metric

        batch = [
            Metric(prefix + key, float(value), int(row["time"] * 1000), int(row["step"]))
            for row in rows
            for key, value in row.items()
            if key not in ROW_COUNTERS
        ]
        for k in range(0, len(batch), MAX_METRICS):
            client.log_batch(run_id, metrics=batch[k : k + MAX_METRICS])
        numbers = [LoggedNumber(m.key, m.step, _clip_infinity(m.value), m.timestamp / 1000) for m in batch]
        self.loggers.log_numbers(run_id, numbers)

    def log_results(self, run_id: str, values: Mapping[str, float], prefix: str = "") -> None:
        """Logs results, which have no step. A result that the run has already is not logged again."""
        known = self.client.get_run(run_id).data.metrics if values else {}
        new = {key: value for key, value in values.items() if not _is_same_number(known.get(prefix + key), value)}
        if new:
            self.log_metrics(run_id, [{"step": 0, "time": time.time(), **new}], prefix)

    def find_last_step(self, run_id: str, key: str) -> int:
        """Returns the last step that is logged under `key`, -1 if there is none."""
        return max((m.step for m in self.client.get_metric_history(run_id, key)), default=-1)


def _is_same_number(known: float | None, value: float) -> bool:
    """Returns True if MLflow has the number, which keeps the largest number for infinity."""
    return known is not None and (_clip_infinity(value) == known or (math.isnan(known) and value != value))


def _clip_infinity(value: float) -> float:
    """Returns a number as MLflow keeps it."""
    largest = sys.float_info.max
    return value if math.isnan(value) else min(max(value, -largest), largest)
