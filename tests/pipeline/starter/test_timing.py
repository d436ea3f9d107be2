"""The rate of a pretraining is measured by a few steps of it."""

from pathlib import Path

import pytest

from firstlight.pipeline.run.launching import side_processes, threads
from firstlight.pipeline.starter import timing
from firstlight.pipeline.starter.choices import Wishes
from firstlight.pipeline.starter.first_run import FirstRun, write_first_run
from firstlight.pipeline.train.metrics import read_metrics
from tests.support.folders_of_noise import write_noise_folder


# One of two processes with three seeds has nothing to do while the other trains the last one.
@pytest.mark.parametrize(("method", "cpus", "share"), [("simclr", 1, 1.0), ("super_and", 2, 0.75)])
def test_rate_is_that_of_steps_of_the_recipe_over_all_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, cpus: int, share: float
) -> None:
    monkeypatch.setattr(side_processes, "count_usable_cpus", lambda: cpus)
    monkeypatch.setattr(threads, "count_usable_cpus", lambda: cpus)
    write_noise_folder(tmp_path / "images", {"a": 12, "b": 12}, (40, 36))
    file = write_first_run(FirstRun(tmp_path / "images", tmp_path / "out", Wishes(method=method)), print)
    seen = list[list[dict[str, float]]]()
    monkeypatch.setattr(timing, "read_metrics", lambda file: seen.append(read_metrics(file)) or seen[-1])
    rate = timing.measure_pretraining_rate(file, 24)
    (rows,) = seen
    assert len(rows) >= timing.NUM_STEPS
    rates = sorted(row["images_per_s"] for row in rows[timing.NUM_WARM_UP_STEPS :])
    assert rates[0] <= rate / share <= rates[-1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["recipe.yaml"]
