"""The loop: a training that is stopped anywhere and continued ends bit-identical; a loss that is not finite changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from firstlight.pipeline.data.plan import BatchPlan
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import StopTraining
from firstlight.pipeline.stages import pretrain
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train import metrics
from firstlight.pipeline.train.checkpoint import Checkpoints
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.loop import fit
from firstlight.pipeline.train.metrics import METRICS_FILE, MetricsLogger, read_metrics
from firstlight.tasks.learner import Batch, Learner
from tests.support import recipes
from tests.support.gloo import Pool
from tests.support.local_training import Stopped, train

STEPS = 6  # two epochs of three


def test_stopped_at_every_step_it_ends_bit_identical(tmp_path: Path, digits: Store) -> None:
    clean, _ = train(tmp_path / "clean", digits)
    for stop in range(1, STEPS + 1):
        folder = tmp_path / f"stop{stop}"
        with pytest.raises(Stopped):
            train(folder, digits, stop)
        assert train(folder, digits)[0] == clean, f"stopped at step {stop}"


def test_a_long_gradient_is_scaled_down(tmp_path: Path, digits: Store) -> None:
    """A step of plain SGD with rate 1 is as long as its gradient."""
    changes = {"stages__pretrain__optimizer": {"name": "SGD", "lr": 1.0}, "stages__pretrain__schedule": None}

    def moved(name: str, clip: float | None) -> Tensor:
        learned = []
        for stop in (2, 3):  # a step is saved after it may have been stopped
            with pytest.raises(Stopped):
                train(tmp_path / name, digits, stop, stages__pretrain__clip_norm=clip, **changes)
            found, _ = Checkpoints(tmp_path / name / "job" / "checkpoints").read_newest()
            assert found is not None
            weights = [
                found.shared["model"][key].flatten()
                for key in sorted(found.shared["model"])
                if key.endswith(("weight", "bias"))
            ]
            learned.append(torch.cat(weights).double())
        return learned[1] - learned[0]

    whole, same, short = moved("whole", None), moved("same", 1e6), moved("short", 1e-3)
    assert float(whole.norm()) > 1e-2
    assert torch.equal(whole, same)
    assert float(short.norm()) == pytest.approx(1e-3, rel=1e-3)


METHODS: dict[str, dict[str, Any]] = {
    "spatial_contrasting": {"method": {"name": "spatial_contrasting", "layers": [0, 1], "patch_size": 1, "patches": 3}},
    "in parallel with labels": {
        "method": {"name": "spatial_contrasting", "patch_size": 1, "supervised_weight": 0.5},
        "labelled_per_batch": 10,
        "labels_per_class": 3,
    },
    "clustering_locality": {
        "method": {"name": "clustering_locality"},
        "labelled_per_batch": 20,
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
    "and": {"method": {"name": "super_and", "dim": 8, "rounds": 2, "aug": False, "ue": False}},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_stopped_at_every_step_ends_bit_identical(tmp_path: Path, digits: Store, name: str) -> None:
    """Two epochs; for Super-AND a round each, so that the discovery of neighbours lies on both sides of a stop."""
    changes = {f"stages__pretrain__{key}": value for key, value in METHODS[name].items()}
    clean, _ = train(tmp_path / "clean", digits, **changes)
    steps = len(read_metrics(tmp_path / "clean" / "job" / METRICS_FILE))
    assert steps >= STEPS
    for stop in range(1, steps):
        folder = tmp_path / f"stop{stop}"
        with pytest.raises(Stopped):
            train(folder, digits, stop, **changes)
        assert train(folder, digits, **changes)[0] == clean, f"stopped at step {stop}"


def method_on_this_rank(folder: str, store: str, name: str, stop: int | None) -> str | None:
    changes = {f"stages__pretrain__{key}": value for key, value in METHODS[name].items()}
    try:
        return train(Path(folder), Store.open(Path(store)), stop, **changes)[0]
    except Stopped:
        return None


@pytest.mark.parametrize("name", ["super_and", "clustering_locality", "dae"])
def test_methods_on_two_workers_stopped_and_continued_end_bit_identical(
    pool: Pool, tmp_path: Path, digits: Store, name: str
) -> None:
    clean = pool.run(method_on_this_rank, str(tmp_path / "clean"), str(digits.path), name, None)
    assert clean[0] == clean[1]
    for stop in (2, 3, 5):
        folder = str(tmp_path / f"stop{stop}")
        assert pool.run(method_on_this_rank, folder, str(digits.path), name, stop) == [None, None]
        assert pool.run(method_on_this_rank, folder, str(digits.path), name, None) == clean


def test_checkpoints_far_apart_repeat_steps_bit_identical(tmp_path: Path, digits: Store) -> None:
    clean, _ = train(tmp_path / "clean", digits)
    with pytest.raises(Stopped):
        train(tmp_path / "far", digits, 5, stages__pretrain__checkpoint_every=2)
    assert train(tmp_path / "far", digits)[0] == clean
    rows = read_metrics(tmp_path / "far" / "job" / METRICS_FILE)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))


def test_every_step_changes_the_state(tmp_path: Path, digits: Store) -> None:
    """Without this, the tests of equal hashes could pass with a hash of nothing."""
    hashes = set()
    for epochs in (1, 2):
        hashes.add(train(tmp_path / str(epochs), digits, stages__pretrain__epochs=epochs)[0])
    other = train(tmp_path / "lr", digits, stages__pretrain__optimizer__lr=0.25)[0]
    assert len({*hashes, other}) == 3


@pytest.mark.fault(1, "SIGKILL in the middle of an epoch")
def test_a_sigkill_in_the_middle_of_an_epoch(tmp_path: Path, digits: Store) -> None:
    clean, _ = train(tmp_path / "clean", digits)
    program = (
        "import sys; from pathlib import Path; from firstlight.pipeline.data.store import Store; from tests.pipeline import test_fit\n"
        "from pipeline import fault; real = fault.maybe\n"
        "import torch; torch.set_num_threads(1)\n"
        "from firstlight.pipeline.train.context import Worker; from pipeline import pretrain; from firstlight.pipeline.train.loop import fit; from firstlight.pipeline.stages.stage import Instance\n"
        "from tests import small; folder = Path(sys.argv[1])\n"
        "worker = Worker.start(small.recipe(folder), Store.open(Path(sys.argv[2])), on_ray=False); stage = worker.recipe.stages['pretrain']\n"
        "job = pretrain.job(worker, stage, Instance('pretrain', 3, 'f', folder / 'job')); fit(job, pretrain.build(worker, stage, job))\n"
    )
    fault = f"rank=0,step=5,kind=sigkill,once={tmp_path / 'once'}"
    command = [sys.executable, "-c", program, str(tmp_path / "killed"), str(digits.path)]
    answer = subprocess.run(
        command, env={**os.environ, "FIRSTLIGHT_FAULT": fault, "PYTHONPATH": os.getcwd()}, timeout=120
    )
    assert answer.returncode == -signal.SIGKILL
    found, _ = Checkpoints(tmp_path / "killed" / "job" / "checkpoints").read_newest()
    assert found is not None
    assert found.step == 4
    assert train(tmp_path / "killed", digits)[0] == clean


def train_on_this_rank(folder: str, store: str, stop: int | None) -> str | None:
    try:
        return train(Path(folder), Store.open(Path(store)), stop)[0]
    except Stopped:
        return None


def test_two_workers_stopped_and_continued_end_bit_identical(pool: Pool, tmp_path: Path, digits: Store) -> None:
    clean = pool.run(train_on_this_rank, str(tmp_path / "clean"), str(digits.path), None)
    assert clean[0] == clean[1]
    for stop in (1, 4):
        folder = str(tmp_path / f"stop{stop}")
        assert pool.run(train_on_this_rank, folder, str(digits.path), stop) == [None, None]
        assert pool.run(train_on_this_rank, folder, str(digits.path), None) == clean


def weights_on_this_rank(folder: str, store: str, stop: int | None) -> dict[str, Tensor] | None:
    try:
        return train(Path(folder), Store.open(Path(store)), stop, stages__pretrain__method__dropout=0.0)[1]
    except Stopped:
        return None


@pytest.mark.fault(48, "continued by one worker instead of two")
def test_two_workers_equal_one_and_can_be_continued_by_one(pool: Pool, tmp_path: Path, digits: Store) -> None:
    one = weights_on_this_rank(str(tmp_path / "one"), str(digits.path), None)
    two = pool.run(weights_on_this_rank, str(tmp_path / "two"), str(digits.path), None)[0]
    pool.run(weights_on_this_rank, str(tmp_path / "mixed"), str(digits.path), 4)
    mixed = weights_on_this_rank(str(tmp_path / "mixed"), str(digits.path), None)
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


@pytest.mark.fault(17, "the newest checkpoint is cut short")
def test_a_damaged_checkpoint_is_passed_over_with_a_note(tmp_path: Path, digits: Store) -> None:
    clean, _ = train(tmp_path / "clean", digits)
    with pytest.raises(Stopped):
        train(tmp_path / "hurt", digits, 5)
    newest = max((tmp_path / "hurt" / "job" / "checkpoints").iterdir())
    (newest / "shared.safetensors").write_bytes(b"x")
    assert train(tmp_path / "hurt", digits)[0] == clean
    assert "damaged" in (tmp_path / "hurt" / "job" / METRICS_FILE).read_text()


@pytest.mark.fault(21, "a checkpoint of other images")
def test_other_images_than_the_checkpoints_are_refused(tmp_path: Path, digits: Store) -> None:
    with pytest.raises(Stopped):
        train(tmp_path, digits, 3)
    with pytest.raises(StopTraining, match="other images or another order"):
        train(tmp_path, digits, dataset__max_train=100)


@pytest.mark.fault(49, "continued with other threads, or another version of torch")
@pytest.mark.parametrize("other", ["threads", "torch"])
def test_other_threads_or_another_torch_are_told(tmp_path: Path, digits: Store, other: str) -> None:
    with pytest.raises(Stopped):
        train(tmp_path, digits, 3)
    manifest = max((tmp_path / "job" / "checkpoints").iterdir()) / "manifest.json"
    manifest.write_text(
        json.dumps({**json.loads(manifest.read_text()), other: {"threads": 2, "torch": "2.0.0"}[other]})
    )
    train(tmp_path, digits)
    text = (tmp_path / "job" / METRICS_FILE).read_text()
    assert "another number of workers, threads or version of torch" in text
    assert "continued from the checkpoint of step 2" in text


@pytest.mark.fault(56, "a clock that jumps back a day at each look")
def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    clean, _ = train(tmp_path / "clean", digits)
    now = [time.time()]

    def jump() -> float:
        now[0] -= 86_400
        return now[0]

    monkeypatch.setattr(time, "time", jump)
    with pytest.raises(Stopped):
        train(tmp_path / "jumps", digits, 4)
    assert train(tmp_path / "jumps", digits)[0] == clean


class Explodes(Learner):
    """Finite for two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.calls = 0

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        return (self.weight.expand(len(batch.ids)),)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        self.calls += 1
        return {"loss": outputs[0].mean() * (float("nan") if self.calls == 3 else 1.0)}


@pytest.mark.fault(37, "a loss that is not finite")
def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path, digits: Store) -> None:
    worker = StageContext.create(recipes.recipe(tmp_path), digits, on_ray=False)
    stage: Any = worker.recipe.stages["pretrain"]
    job = pretrain.build_job(worker, stage, StageInstance("pretrain", 0, "f", tmp_path / "job"))
    learner = Explodes()
    with pytest.raises(StopTraining, match=r"step 2 is not finite; nothing was updated"):
        fit(job, learner)
    told = json.loads((tmp_path / "job" / "nonfinite.json").read_text())
    assert told["step"] == 2
    assert told["ids"] == np.sort(job.plan.epoch(0)[2]).tolist()
    found, _ = Checkpoints(tmp_path / "job" / "checkpoints").read_newest()
    assert found is not None
    assert found.step == 2
    assert torch.equal(found.shared["model"]["weight"], learner.weight.detach())


class ExplodesOnOne(Explodes):
    """Not finite where image `bad` is."""

    def __init__(self, bad: int) -> None:
        super().__init__()
        self.bad = bad

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        return {"loss": outputs[0].mean() * (float("inf") if self.bad in batch.ids.tolist() else 1.0)}


def stopped_on_this_rank(folder: str, store: str) -> str:
    worker = StageContext.create(recipes.recipe(Path(folder)), Store.open(Path(store)), on_ray=False)
    stage: Any = worker.recipe.stages["pretrain"]
    job = pretrain.build_job(worker, stage, StageInstance("pretrain", 0, "f", Path(folder) / "job"))
    bad = int(job.plan.slice(0, 1, 1, 2)[0][0])
    try:
        fit(job, ExplodesOnOne(bad))
    except StopTraining as stop:
        return str(stop)
    return "went on"


@pytest.mark.fault(37, "a loss that is not finite on one of two workers")
def test_all_workers_stop_when_one_loss_is_not_finite(pool: Pool, tmp_path: Path, digits: Store) -> None:
    answers = pool.run(stopped_on_this_rank, str(tmp_path), str(digits.path))
    assert answers[0] == answers[1]
    assert "step 1 is not finite" in answers[0]
    assert "Its 16 image ids" in answers[0]


def first_loss(folder: Path) -> float:
    return float(read_metrics(folder / "job" / METRICS_FILE)[0]["loss"])


def test_the_memory_layout_changes_no_more_than_rounding(tmp_path: Path, digits: Store) -> None:
    _, plain = train(tmp_path / "plain", digits, stages__pretrain__epochs=1)
    _, other = train(tmp_path / "other", digits, stages__pretrain__epochs=1, stages__pretrain__channels_last=True)
    for name, weight in plain.items():
        if weight.is_floating_point():  # counts of images that changed targets tell of ties that rounding may turn
            torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-4)


def test_bf16_computes_roughly_the_same_with_float32_weights(tmp_path: Path, digits: Store) -> None:
    train(tmp_path / "plain", digits, stages__pretrain__epochs=1)
    _, weights = train(tmp_path / "bf16", digits, stages__pretrain__epochs=1, stages__pretrain__precision="bf16")
    assert {w.dtype for w in weights.values()} == {torch.float32, torch.int64}
    assert first_loss(tmp_path / "bf16") == pytest.approx(first_loss(tmp_path / "plain"), rel=0.02)
    assert first_loss(tmp_path / "bf16") != first_loss(tmp_path / "plain")


CONTRAST = {  # couples all images of a batch, smoothly: rounding cannot be blown up by an assignment that flips
    "encoder__norm": "group",
    "stages__pretrain__method": {"name": "spatial_contrasting", "patch_size": 1},
}


def test_a_batch_embedded_in_parts_trains_as_the_whole(tmp_path: Path, digits: Store) -> None:
    """Averaging the gradients of parts would be another training: an anchor would be contrasted with its own part only."""
    _, whole = train(tmp_path / "whole", digits, **CONTRAST)
    for parts in (2, 8):
        _, weights = train(tmp_path / str(parts), digits, **CONTRAST, stages__pretrain__accumulate=parts)
        for name, weight in whole.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5)
    ends = {stop: read_metrics(tmp_path / stop / "job" / METRICS_FILE)[-1] for stop in ("whole", "8")}
    assert ends["8"]["loss"] == pytest.approx(ends["whole"]["loss"], rel=1e-5)


def parts_on_this_rank(folder: str, store: str) -> dict[str, Tensor]:
    return train(Path(folder), Store.open(Path(store)), **CONTRAST, stages__pretrain__accumulate=4)[1]


def test_parts_on_two_workers_train_as_the_whole_on_one(pool: Pool, tmp_path: Path, digits: Store) -> None:
    _, whole = train(tmp_path / "whole", digits, **CONTRAST)
    for weights in pool.run(parts_on_this_rank, str(tmp_path / "two"), str(digits.path)):
        for name, weight in whole.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5)


def test_parts_stopped_and_continued_end_bit_identical(tmp_path: Path, digits: Store) -> None:
    changes = {"stages__pretrain__accumulate": 4, "encoder__norm": "batch", "stages__pretrain__method__dropout": 0.5}
    clean, weights = train(tmp_path / "clean", digits, **changes)
    assert int(weights["encoder.stages.0.1.num_batches_tracked"]) == 4 * STEPS, (
        "a part counts once in the running statistics"
    )
    for stop in (1, 4):
        with pytest.raises(Stopped):
            train(tmp_path / str(stop), digits, stop, **changes)
        assert train(tmp_path / str(stop), digits, **changes)[0] == clean


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_plateau_is_seen_and_survives_a_stop(tmp_path: Path, digits: Store, interval: str) -> None:
    plateau = {
        "name": "ReduceLROnPlateau",
        "interval": interval,
        "factor": 0.1,
        "patience": 0,
        "threshold": 10.0,
        "threshold_mode": "abs",
    }
    changes = {"stages__pretrain__schedule": plateau, "stages__pretrain__epochs": 3}
    clean, _ = train(tmp_path / "clean", digits, **changes)
    rates = [row["lr"] for row in read_metrics(tmp_path / "clean" / "job" / METRICS_FILE)]
    first = 6 if interval == "epoch" else 2  # nothing falls by ten: the second look is the first without improvement
    assert rates[first - 2] == 0.5
    assert rates[first - 1] == pytest.approx(0.05)
    for stop in (1, 4, 6):
        with pytest.raises(Stopped):
            train(tmp_path / str(stop), digits, stop, **changes)
        assert train(tmp_path / str(stop), digits, **changes)[0] == clean


class Looks(Learner):
    """Remembers the labels and rows that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[Batch] = []

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        return (self.weight.expand(len(batch.ids)),)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        self.seen.append(batch)
        return {"loss": outputs[0].mean()}


@pytest.mark.parametrize(("labelled", "per_class", "visible"), [(0, None, 0), (8, 2, 8), (32, 5, 32)])
def test_a_method_sees_the_labels_that_the_stage_gives_and_no_others(
    tmp_path: Path, digits: Store, labelled: int, per_class: int | None, visible: int
) -> None:
    changes = {"stages__pretrain__labelled_per_batch": labelled, "stages__pretrain__labels_per_class": per_class}
    worker = StageContext.create(recipes.recipe(tmp_path, **changes), digits, on_ray=False)
    stage: Any = worker.recipe.stages["pretrain"]
    job = pretrain.build_job(worker, stage, StageInstance("pretrain", 0, "f", tmp_path / "job"))
    learner = Looks()
    fit(job, learner)
    few = set(worker.splits.labelled_subset(stage, 0).tolist()) if labelled else set()
    for batch in learner.seen:
        assert int((batch.labels >= 0).sum()) == visible
        assert torch.equal(torch.from_numpy(job.plan.ids)[batch.rows], batch.ids)
        for image_id, label in zip(batch.ids.tolist(), batch.labels.tolist(), strict=True):
            assert label == (worker.splits.labels[image_id] if image_id in few else -1)


@pytest.mark.parametrize(("pause", "told"), [(0.05, True), (None, False)])
def test_a_training_that_waits_for_images_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause: float | None, told: bool
) -> None:
    monkeypatch.setattr(metrics, "WAIT_AFTER_S", 0.05)
    plan = BatchPlan(np.arange(40), np.array([0]), 4, 0, 8, False)

    def stream() -> Iterator[dict[str, Any]]:
        for _ in range(10):
            if pause:
                time.sleep(pause)
            yield {}

    clock = MetricsLogger(tmp_path, plan, 10, 0, torch.device("cpu"))
    for step, _ in enumerate(clock.time_waits(stream()), 1):
        time.sleep(0.02)
        clock.log_step(step, {"loss": 1.0})
    assert ("waited for images" in (tmp_path / METRICS_FILE).read_text()) == told


def one_of_two_waits(folder: str) -> None:
    """On rank 0 the step takes as long as rank 1 waits."""
    clock = MetricsLogger(
        Path(folder), BatchPlan(np.arange(40), np.array([0]), 4, 0, 8, False), 10, 0, torch.device("cpu")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "WAIT_AFTER_S", 0.05)
        for step, _ in enumerate(clock.time_waits(late({}, 0.05 * dist.get_rank()) for _ in range(10)), 1):
            time.sleep(0.05 * (1 - dist.get_rank()))
            clock.log_step(step, {"loss": 1.0})


def late(batch: dict[str, Any], seconds: float) -> dict[str, Any]:
    time.sleep(seconds)
    return batch


def test_the_share_of_waiting_is_each_workers(pool: Pool, tmp_path: Path) -> None:
    pool.run(one_of_two_waits, str(tmp_path))
    last = read_metrics(tmp_path / METRICS_FILE)[-1]
    assert last["data_wait_worker1"] > 0.5 > last["data_wait_worker0"]
    assert last["data_wait"] == pytest.approx((last["data_wait_worker0"] + last["data_wait_worker1"]) / 2)
    assert "worker 1 waited for images" in (tmp_path / METRICS_FILE).read_text()


def test_super_and_finds_its_first_neighbours_in_what_the_network_sees(tmp_path: Path, digits: Store) -> None:
    """Not in a bank of noise: even an untrained network puts a digit beside one of its class more often than chance."""
    changes = {
        "stages__pretrain__method": {"name": "super_and", "rounds": 1},
        "encoder__width": 16,
        "stages__pretrain__epochs": 1,
    }
    train(tmp_path, digits, **changes)
    rows = read_metrics(tmp_path / "job" / METRICS_FILE)
    assert rows[0]["selected"] == 1.0
    assert rows[0]["consistency"] > 0.3, "ten classes"
    assert "looked at once" in (tmp_path / "job" / METRICS_FILE).read_text()


def buffers_on_this_rank(folder: str, store: str, accumulate: int) -> list[Tensor]:
    changes: dict[str, Any] = {
        "encoder__norm": "batch",
        "stages__pretrain__accumulate": accumulate,
        "stages__pretrain__epochs": 1,
    }
    weights = train(Path(folder), Store.open(Path(store)), **changes)[1]
    return [value for name, value in sorted(weights.items()) if "running" in name]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_all_workers_end_with_the_running_statistics_that_are_handed_on(
    pool: Pool, tmp_path: Path, digits: Store, accumulate: int
) -> None:
    first, second = pool.run(buffers_on_this_rank, str(tmp_path), str(digits.path), accumulate)
    assert first
    for mine, theirs in zip(first, second, strict=True):
        assert torch.equal(mine, theirs)
