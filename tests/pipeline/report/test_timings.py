"""The shares of time of a training, read from files."""

import json
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.report.timings import Timing, collect_notes, read_timings, sum_part_seconds, time_shares
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.attempts import ATTEMPTS_FILE
from firstlight.pipeline.train.metrics import METRICS_FILE

# The facts of an attempt that reports show.
MACHINE = '{"host": "h", "system": "s", "device": "cpu", "cpus": 2, "workers": 1, "threads": 1, "versions": {}}'


def row(step: int, seconds: float, before: int, **shares: float) -> dict[str, Any]:
    """Returns a row of a training with batches of 10."""
    speed = {"images_per_s": (step - before) * 10 / seconds}
    return {"step": step, "of": 8, "time": 1000.0 + step, "loss": 1.0, **speed, **shares}


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / METRICS_FILE


LINES = (
    row(2, 4.0, 0, time_data=0.25, time_forward=0.5),
    {"note": "something"},
    {"spent": {"looks": 7.0}},
    row(8, 10.0, 2, time_data=0.1, time_forward=0.2),
    {"spent": {"checkpoint": 0.5}},
)


def test_shares_of_rows_become_seconds_and_separately_logged_seconds_are_added(tmp_path: Path) -> None:
    assert sum_part_seconds(write(tmp_path, *LINES), 10) == pytest.approx(
        {"data": 2.0, "forward": 4.0, "looks": 7.0, "checkpoint": 0.5}
    )


def test_unaccounted_time_is_other_and_a_stage_without_training_is_evaluation(tmp_path: Path) -> None:
    trained, looked, unborn = (StageInstance(name, 0, "f", tmp_path / name) for name in ("train", "look", "unborn"))
    write(trained.folder / "arm", *LINES)
    write(looked.folder, {"step": 1, "of": 1, "time": 1.0, "images_per_s": 5.0})
    for instance, seconds in ((trained, 20.0), (looked, 3.0)):
        (instance.folder / ATTEMPTS_FILE).write_text(
            f'{{"began": 1.0, "machine": {MACHINE}}}\n{{"ended": 9.0, "seconds": {seconds}}}\n'
        )
    first, second = read_timings([trained, looked, unborn], {"train": 10})
    assert (first.label, first.seconds) == ("train seed 0", 20.0)
    assert first.parts == pytest.approx({"data": 2.0, "forward": 4.0, "looks": 7.0, "checkpoint": 0.5, "other": 6.5})
    assert second == Timing("look seed 0", 3.0, {"evaluation": 3.0})
    assert collect_notes([trained, looked]) == ["train seed 0 arm: something"]


def test_a_killed_attempt_is_counted_by_what_it_logged(tmp_path: Path) -> None:
    instance = StageInstance("train", 0, "f", tmp_path)
    write(tmp_path, *LINES)
    (tmp_path / ATTEMPTS_FILE).write_text(f'{{"began": 1.0, "machine": {MACHINE}}}\n{{"beg')
    (found,) = read_timings([instance], {"train": 10})
    assert found.seconds == pytest.approx(13.5)
    assert found.parts["other"] == 0.0


def test_shares_are_in_order_without_the_small_and_never_more_than_the_whole() -> None:
    assert time_shares(Timing("a", 10.0, {"forward": 4.0, "data": 5.0, "tables": 0.001, "other": 0.999})) == [
        ("data", 0.5),
        ("forward", 0.4),
        ("other", pytest.approx(0.0999)),
    ]
    overlapping = time_shares(Timing("a", 10.0, {"forward": 10.0, "data": 10.0}))
    assert overlapping == [("data", 0.5), ("forward", 0.5)]
