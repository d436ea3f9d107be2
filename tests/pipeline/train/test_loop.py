"""A training that is stopped anywhere and continued ends bit-identical to one that never stopped."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.pretraining import job as pretrain_job
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.checkpoint import Checkpoints
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.failures import fault_from_environment
from firstlight.pipeline.train.loop import fit
from firstlight.pipeline.train.metrics import METRICS_FILE, read_metrics
from firstlight.tasks.learner import Batch
from firstlight.tasks.memory_bank import MemoryBank
from firstlight.tasks.pretrain.super_and import SuperAnd
from firstlight.tasks.sample_table import SampleTable
from tests.support import recipes
from tests.support.clean_process import run_in_clean_process
from tests.support.gloo import Pool
from tests.support.local_training import Stopped, find_copy, train, train_with_copies
from tests.support.state_hash import hash_state

STEPS = 6  # two epochs of three


def test_training_stopped_at_any_step_resumes_bit_identical(tmp_path: Path, digits: Store) -> None:
    clean = train_with_copies(tmp_path / "clean", digits, range(1, STEPS + 1))
    for stop in range(1, STEPS + 1):
        folder = tmp_path / f"stop{stop}"
        with pytest.raises(Stopped):
            train(folder, digits, stop)
        assert read_state(folder) == read_state(find_copy(tmp_path / "clean", stop)), "a copy is what a stop leaves"
        assert train(folder, digits)[0] == clean, f"stopped at step {stop}"


def read_state(folder: Path) -> Any:
    """Returns the step and a hash of the newest checkpoint, and the steps and losses that are logged."""
    found, _ = Checkpoints(folder / "job" / "checkpoints").read_newest()
    rows = [(row["step"], row["loss"]) for row in read_metrics(folder / "job" / METRICS_FILE)]
    return found and (found.step, hash_state([found.shared, found.shards])), rows


METHODS: dict[str, dict[str, Any]] = {
    "spatial_contrasting": {"method": {"name": "spatial_contrasting", "layers": [0, 1], "patch_size": 1, "patches": 3}},
    "in parallel with labels": {
        "method": {"name": "spatial_contrasting", "patch_size": 1, "supervised_weight": 0.5},
        "labelled_per_batch": 10,
        "labels_per_class": 3,
    },
    "clustering_locality": {
        "method": {"name": "clustering_locality"},
        "labelled_per_batch": 10,
        "labels_per_class": 2,
        "accumulate": 2,
    },
    "dae": {
        "method": {"name": "dae", "corruption": "small_blocks"},
        "optimizer": {"name": "Adam", "lr": 0.01},
        "schedule": {"name": "ReduceLROnPlateau", "interval": "epoch", "patience": 0},
    },
    "super_and": {"method": {"name": "super_and", "dim": 8, "rounds": 2, "ue_period": 1, "chunk": 40}},
    "super_and reference": {
        "method": {"name": "super_and", "dim": 8, "rounds": 2, "variant": "reference", "initial": "multiple"},
        "schedule": {"name": "MultiStepLR", "milestones": [2], "gamma": 0.1, "period": 3},
    },
    "fixmatch": {
        "method": {"name": "fixmatch", "threshold": "flexible", "cutoff": 0.2},
        "labelled_per_batch": 10,
        "labels_per_class": 3,
        "accumulate": 2,
        "ema": 0.9,
    },
    "fixmatch free": {
        "method": {"name": "fixmatch", "threshold": "free", "momentum": 0.5},
        "labelled_per_batch": 10,
        "labels_per_class": 3,
    },
    "simclr": {"method": {"name": "simclr", "dim": 8}, "accumulate": 2},
    "byol": {
        "method": {"name": "byol", "dim": 8, "hidden": [16], "momentum": 0.5, "exported": "target"},
        "accumulate": 2,
    },
    "vicreg": {"method": {"name": "vicreg", "dim": 8}, "optimizer": {"name": "SGD", "lr": 0.005, "momentum": 0.9}},
    "lejepa": {
        "method": {"name": "lejepa", "local_views": 1, "hidden": [16], "norm": "sync", "directions": 8},
        "optimizer": {"name": "AdamW", "lr": 0.005},
        "accumulate": 2,
    },
    "distill": {
        "method": {
            "name": "distill",
            "teacher": {"name": "convnet", "width": 5, "depth": 2, "input": "gray"},
            "teacher_size": 12,
            "norm": "sync",
        },
        "accumulate": 2,
    },
    "nat sparse": {"method": {"name": "nat", "dim": 8, "hidden": [], "pool": "avg", "solver": "sparse"}},
    "dino": {
        "method": {
            "name": "dino",
            "local_views": 1,
            "prototypes": 9,
            "hidden": [8],
            "bottleneck": 4,
            "warmup_epochs": 3,
        },
        "accumulate": 2,
    },
    "and": {"method": {"name": "super_and", "dim": 8, "rounds": 2, "aug": False, "ue": False, "views": 1}},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_stopped_at_any_step_resumes_bit_identical(tmp_path: Path, digits: Store, name: str) -> None:
    """Two epochs, for Super-AND one round each, so that a discovery of neighbours is on both sides of a stop."""
    changes = {f"stages__pretrain__{key}": value for key, value in METHODS[name].items()}
    clean = train_with_copies(tmp_path / "clean", digits, range(1, 100), **changes)
    steps = len(read_metrics(tmp_path / "clean" / "job" / METRICS_FILE))
    assert steps >= STEPS
    for stop in range(1, steps):
        assert train(find_copy(tmp_path / "clean", stop), digits, **changes)[0] == clean, f"stopped at step {stop}"


def train_method_on_this_rank(folder: str, store: str, name: str, norm: str, copied: tuple[int, ...] = ()) -> str:
    changes = {f"stages__pretrain__{key}": value for key, value in METHODS[name].items()}
    return train_with_copies(Path(folder), Store.open(Path(store)), copied, **changes, encoder__norm=norm)


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("super_and", "sync"),
        ("super_and", "batch"),
        ("clustering_locality", "sync"),
        ("dae", "sync"),
        ("fixmatch", "sync"),
        ("fixmatch free", "sync"),
        ("nat sparse", "sync"),
        ("byol", "sync"),
        ("byol", "batch"),
        ("dino", "sync"),
    ],
)
def test_methods_on_two_workers_resume_bit_identical(
    pool: Pool, tmp_path: Path, digits: Store, name: str, norm: str
) -> None:
    """The second stop is after the first step of an epoch, so that the training continues where it begins.

    With `norm: batch`, workers have different running statistics when Super-AND reads all images there.
    """
    stops = (2, 4, 5)
    clean = pool.run(train_method_on_this_rank, str(tmp_path / "clean"), str(digits.path), name, norm, stops)
    assert clean[0] == clean[1]
    for stop in stops:
        folder = str(find_copy(tmp_path / "clean", stop))
        assert pool.run(train_method_on_this_rank, folder, str(digits.path), name, norm) == clean


def test_steps_after_the_last_checkpoint_are_repeated_bit_identical(tmp_path: Path, digits: Store) -> None:
    clean, _ = train(tmp_path / "clean", digits)
    with pytest.raises(Stopped):
        train(tmp_path / "far", digits, 5, stages__pretrain__checkpoint_every=2)
    assert train(tmp_path / "far", digits)[0] == clean
    rows = read_metrics(tmp_path / "far" / "job" / METRICS_FILE)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))


def test_state_hash_differs_between_trainings(tmp_path: Path, digits: Store) -> None:
    """This test excludes that the tests of equal hashes pass with a hash of nothing."""
    hashes = set()
    for epochs in (1, 2):
        hashes.add(train(tmp_path / str(epochs), digits, stages__pretrain__epochs=epochs)[0])
    other = train(tmp_path / "lr", digits, stages__pretrain__optimizer__lr=0.25)[0]
    assert len({*hashes, other}) == 3


def train_with_fault(folder: str, store: str) -> None:
    """Trains the small recipe with the fault of FIRSTLIGHT_FAULT."""
    context = StageContext.create(recipes.recipe(Path(folder)), Store.open(Path(store)), on_ray=False)
    stage: Any = context.recipe.stages["pretrain"]
    job = pretrain_job.build_job(context, stage, StageInstance("pretrain", 3, "f", Path(folder) / "job"))
    with fault_from_environment():
        fit(job, pretrain_job.build_seeded_method(context, stage, job))


@pytest.mark.fault(1, "SIGKILL in the middle of an epoch")
def test_training_killed_by_sigkill_resumes_bit_identical(tmp_path: Path, digits: Store) -> None:
    clean, _ = train(tmp_path / "clean", digits)
    fault = f"rank=0,step=5,kind=sigkill,once={tmp_path / 'once'}"
    code = run_in_clean_process(
        train_with_fault, str(tmp_path / "killed"), str(digits.path), environment={"FIRSTLIGHT_FAULT": fault}
    )
    assert code == -signal.SIGKILL
    found, _ = Checkpoints(tmp_path / "killed" / "job" / "checkpoints").read_newest()
    assert found is not None
    assert found.step == 4
    assert train(tmp_path / "killed", digits)[0] == clean


def train_on_this_rank(folder: str, store: str, stop: int | None) -> str | None:
    try:
        return train(Path(folder), Store.open(Path(store)), stop)[0]
    except Stopped:
        return None


def test_two_workers_resume_bit_identical(pool: Pool, tmp_path: Path, digits: Store) -> None:
    clean = pool.run(train_on_this_rank, str(tmp_path / "clean"), str(digits.path), None)
    assert clean[0] == clean[1]
    for stop in (1, 4):
        folder = str(tmp_path / f"stop{stop}")
        assert pool.run(train_on_this_rank, folder, str(digits.path), stop) == [None, None]
        assert pool.run(train_on_this_rank, folder, str(digits.path), None) == clean


def train_weights_on_this_rank(folder: str, store: str, stop: int | None) -> dict[str, Tensor] | None:
    try:
        return train(Path(folder), Store.open(Path(store)), stop, stages__pretrain__method__dropout=0.0)[1]
    except Stopped:
        return None


@pytest.mark.fault(48, "continued by one worker instead of two")
def test_two_workers_equal_one_and_one_worker_resumes_both(pool: Pool, tmp_path: Path, digits: Store) -> None:
    one = train_weights_on_this_rank(str(tmp_path / "one"), str(digits.path), None)
    two = pool.run(train_weights_on_this_rank, str(tmp_path / "two"), str(digits.path), None)[0]
    pool.run(train_weights_on_this_rank, str(tmp_path / "mixed"), str(digits.path), 4)
    mixed = train_weights_on_this_rank(str(tmp_path / "mixed"), str(digits.path), None)
    assert one is not None
    assert two is not None
    assert mixed is not None
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mixed[name], weight, rtol=1e-4, atol=1e-5)
    notes = [
        json.loads(line).get("note", "")
        for line in (tmp_path / "mixed" / "job" / METRICS_FILE).read_text().splitlines()
    ]
    assert any("another number of workers" in note for note in notes)


@pytest.mark.fault(56, "a clock that jumps back a day at each look")
def test_wall_clock_that_jumps_back_changes_nothing(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, _ = train(tmp_path / "clean", digits)
    now = [time.time()]

    def jump() -> float:
        now[0] -= 86_400
        return now[0]

    monkeypatch.setattr(time, "time", jump)
    with pytest.raises(Stopped):
        train(tmp_path / "jumps", digits, 4)
    assert train(tmp_path / "jumps", digits)[0] == clean


def test_super_and_finds_first_neighbours_by_features_of_the_network(tmp_path: Path, digits: Store) -> None:
    """Its bank is not noise: neighbours by an untrained network have the same class more often than by chance."""
    changes = {
        "stages__pretrain__method": {"name": "super_and", "rounds": 1},
        "encoder__width": 16,
        "stages__pretrain__epochs": 1,
    }
    train(tmp_path, digits, **changes)
    rows = read_metrics(tmp_path / "job" / METRICS_FILE)
    assert rows[0]["selected"] == 1.0
    assert rows[0]["consistency"] > 0.3, "ten classes"
    assert "read once" in (tmp_path / "job" / METRICS_FILE).read_text()


@pytest.mark.parametrize(
    ("method", "read", "by_features"),
    [
        ({"variant": "paper"}, [1, 3], [False, True]),
        ({"variant": "paper", "initial": "multiple"}, [3], [True]),
        ({"variant": "reference"}, [1], [False, False]),
    ],
)
def test_super_and_reads_all_images_before_rounds_that_search_by_features(
    tmp_path: Path,
    digits: Store,
    monkeypatch: pytest.MonkeyPatch,
    method: dict[str, Any],
    read: list[int],
    by_features: list[bool],
) -> None:
    """Two rounds of two epochs. Before the first, the bank takes the features."""
    search, found = MemoryBank.find_neighbours, []

    def find(bank: MemoryBank, temperature: float, features: SampleTable | None = None) -> tuple[Tensor, Tensor]:
        found.append(features is not None)
        return search(bank, temperature, features)

    monkeypatch.setattr(MemoryBank, "find_neighbours", find)
    changes = {"stages__pretrain__method": {"name": "super_and", "dim": 8, "rounds": 2, **method}}
    train(tmp_path, digits, **changes, stages__pretrain__epochs=4)
    lines = (tmp_path / "job" / METRICS_FILE).read_text().splitlines()
    notes = [json.loads(line).get("note", "") for line in lines]
    assert [note for note in notes if "read once" in note] == [
        f"all images are read once before epoch {epoch}" for epoch in read
    ]
    assert found == by_features
    assert [row["step"] for row in read_metrics(tmp_path / "job" / METRICS_FILE)] == list(range(1, 2 * STEPS + 1))


def test_reading_all_images_is_no_waiting_for_data(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = SuperAnd.fill_tables

    def fill_slowly(method: SuperAnd, batch: Batch) -> None:
        end = time.process_time() + 0.4
        while time.process_time() < end:
            pass
        fill(method, batch)

    monkeypatch.setattr(SuperAnd, "fill_tables", fill_slowly)
    changes = {"stages__pretrain__method": {"name": "super_and", "dim": 8, "rounds": 2, "initial": "multiple"}}
    train(tmp_path, digits, **changes)
    rows = read_metrics(tmp_path / "job" / METRICS_FILE)
    assert rows[3]["epoch"] == 1
    assert rows[3]["images_per_s"] > 32.0, "three batches of 32 took more than a second to read"
    assert rows[3]["images_per_cpu_s"] > 32.0, "and of a CPU"
    assert rows[3]["data_wait"] <= 1.0


def train_buffers_on_this_rank(folder: str, store: str, accumulate: int) -> list[Tensor]:
    changes: dict[str, Any] = {
        "encoder__norm": "batch",
        "stages__pretrain__accumulate": accumulate,
        "stages__pretrain__epochs": 1,
    }
    weights = train(Path(folder), Store.open(Path(store)), **changes)[1]
    return [value for name, value in sorted(weights.items()) if "running" in name]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_all_workers_end_with_equal_running_statistics(
    pool: Pool, tmp_path: Path, digits: Store, accumulate: int
) -> None:
    first, second = pool.run(train_buffers_on_this_rank, str(tmp_path), str(digits.path), accumulate)
    assert first
    for mine, theirs in zip(first, second, strict=True):
        assert torch.equal(mine, theirs)
