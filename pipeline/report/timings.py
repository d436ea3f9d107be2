"""The wall time of stages and its parts, read from the files that the workers wrote."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.attempts import read_attempts
from firstlight.pipeline.train.metrics import METRICS_FILE, SPENT_KEY, TIME_PREFIX, read_metrics_rows

# The parts in the order in which the report shows them. looks: feature metrics of held-out images during a training;
# evaluation: stages that train nothing; other: the rest, such as starting, reading images for the first time, and
# scoring the trained networks.
TIME_PARTS = (
    "data",
    "forward",
    "backward",
    "tables",
    "assignment",
    "communication",
    "optimizer",
    "checkpoint",
    "looks",
    "evaluation",
    "other",
)
# Parts with a smaller share are not shown.
MIN_TIME_SHARE = 0.002


@dataclass(frozen=True)
class Timing:
    """The seconds of a stage and seed, and of its parts by name."""

    label: str
    seconds: float
    parts: dict[str, float]


def read_timings(instances: Sequence[StageInstance], batch_sizes: dict[str, int]) -> list[Timing]:
    """Returns the timings of all instances that have begun. `batch_sizes`: those of the stages that train, by stage."""
    out = []
    for instance in instances:
        work = read_attempts(instance.folder)
        if work is None:
            continue
        trained = Counter[str]()
        if instance.stage in batch_sizes:
            for file in sorted(instance.folder.rglob(METRICS_FILE)):
                trained.update(sum_part_seconds(file, batch_sizes[instance.stage]))
        total = max(work.seconds, sum(trained.values()))
        rest = "other" if instance.stage in batch_sizes else "evaluation"
        out.append(Timing(instance.label, total, {**trained, rest: total - sum(trained.values())}))
    return out


def sum_part_seconds(file: Path, batch_size: int) -> dict[str, float]:
    """Returns the seconds of a training by part, from its metrics file."""
    seconds, before = Counter[str](), 0
    for row in read_metrics_rows(file):
        if "loss" in row:
            elapsed = (row["step"] - before) * batch_size / max(row["images_per_s"], 1e-9)
            before = row["step"]
            seconds.update(
                {
                    name.removeprefix(TIME_PREFIX): share * elapsed
                    for name, share in row.items()
                    if name.startswith(TIME_PREFIX)
                }
            )
        seconds.update(row.get(SPENT_KEY, {}))
    return dict(seconds)


def time_shares(timing: Timing) -> list[tuple[str, float]]:
    """Returns the shares of the parts in the order of TIME_PARTS, without those below MIN_TIME_SHARE.

    On a GPU the parts may add up to more than the whole, because it computes while its process waits. Then they are
    shares of their sum.
    """
    whole = max(timing.seconds, sum(timing.parts.values()), 1e-9)
    return [
        (name, timing.parts[name] / whole)
        for name in TIME_PARTS
        if timing.parts.get(name, 0.0) / whole > MIN_TIME_SHARE
    ]


def collect_notes(instances: Sequence[StageInstance]) -> list[str]:
    """Returns the notes that the stages logged for the user, each line once."""
    found: dict[str, None] = {}
    for instance in instances:
        for file in sorted(instance.folder.rglob(METRICS_FILE)):
            rows: list[dict[str, Any]] = read_metrics_rows(file)
            label = instance.label if file.parent == instance.folder else f"{instance.label} {file.parent.name}"
            found |= {f"{label}: {row['note']}": None for row in rows if "note" in row}
    return list(found)
