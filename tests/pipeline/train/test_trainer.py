"""One step of a training, and how its state is continued: in parts, on two workers, and after a stop."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.stream import TrainOrder
from firstlight.pipeline.errors import StopTraining
from firstlight.pipeline.records import write_sealed_json
from firstlight.pipeline.stages.pretraining import job as pretrain_job
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train import update_guard
from firstlight.pipeline.train.checkpoint import Checkpoints
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.loop import fit, open_batches
from firstlight.pipeline.train.metrics import METRICS_FILE, read_metrics
from firstlight.pipeline.train.trainer import Trainer
from firstlight.pipeline.train.training_job import to_batch
from firstlight.tasks.learner import Batch, Learner
from tests.support import recipes
from tests.support.gloo import Pool
from tests.support.local_training import Stopped, train

STEPS = 6


def test_gradient_clipping_limits_the_update(tmp_path: Path, digits: Store) -> None:
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


@pytest.mark.fault(17, "the newest checkpoint is cut short")
def test_damaged_checkpoint_is_skipped_with_note(tmp_path: Path, digits: Store) -> None:
    clean, _ = train(tmp_path / "clean", digits)
    with pytest.raises(Stopped):
        train(tmp_path / "hurt", digits, 5)
    newest = max((tmp_path / "hurt" / "job" / "checkpoints").iterdir())
    (newest / "shared.safetensors").write_bytes(b"x")
    assert train(tmp_path / "hurt", digits)[0] == clean
    assert "damaged" in (tmp_path / "hurt" / "job" / METRICS_FILE).read_text()


@pytest.mark.fault(21, "a checkpoint of other images")
def test_checkpoint_of_other_images_is_refused(tmp_path: Path, digits: Store) -> None:
    with pytest.raises(Stopped):
        train(tmp_path, digits, 3)
    with pytest.raises(StopTraining, match="other images or another order"):
        train(tmp_path, digits, dataset__max_train=100)


@pytest.mark.fault(49, "continued with other threads, or another version of torch")
@pytest.mark.parametrize("other", ["threads", "torch"])
def test_resume_with_other_threads_or_torch_writes_note(tmp_path: Path, digits: Store, other: str) -> None:
    with pytest.raises(Stopped):
        train(tmp_path, digits, 3)
    manifest = max((tmp_path / "job" / "checkpoints").iterdir()) / "manifest.json"
    write_sealed_json(manifest, {**json.loads(manifest.read_text()), other: {"threads": 2, "torch": "2.0.0"}[other]})
    train(tmp_path, digits)
    text = (tmp_path / "job" / METRICS_FILE).read_text()
    assert "another number of workers, threads or version of torch" in text
    assert "continued from the checkpoint of step 2" in text


class ExplodingLearner(Learner):
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
@pytest.mark.parametrize("log_every", [1, 5])
@pytest.mark.parametrize("on_host", [True, False])
def test_nonfinite_loss_raises_before_update(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch, on_host: bool, log_every: int
) -> None:
    """On a GPU, where the host does not look, further steps are made and undone before the next log line."""
    monkeypatch.setattr(update_guard, "is_host_memory", lambda device: on_host)
    changes = {
        "stages__pretrain__log_every": log_every,
        "stages__pretrain__checkpoint_every": 2 if log_every > 1 else 1,
    }
    context = StageContext.create(recipes.recipe(tmp_path, **changes), digits, on_ray=False)
    stage: Any = context.recipe.stages["pretrain"]
    job = pretrain_job.build_job(context, stage, StageInstance("pretrain", 0, "f", tmp_path / "job"))
    learner = ExplodingLearner()
    with pytest.raises(StopTraining, match=r"step 2 is not finite; nothing was updated by it") as stop:
        fit(job, learner)
    assert stop.value.__notes__ == ["after step 2"]
    # The loss is looked at in a log line, or before a checkpoint.
    assert learner.calls == (3 if on_host or log_every == 1 else 4)
    record = json.loads((tmp_path / "job" / "nonfinite.json").read_text())
    assert record["step"] == 2
    assert record["ids"] == np.sort(job.plan.epoch(0)[2]).tolist()
    found, _ = Checkpoints(tmp_path / "job" / "checkpoints").read_newest()
    assert found is not None
    assert found.step == 2
    assert torch.equal(found.shared["model"]["weight"], learner.weight.detach())


class LearnerExplodingOnImage(ExplodingLearner):
    """Not finite where image `bad` is."""

    def __init__(self, bad: int) -> None:
        super().__init__()
        self.bad = bad

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        return {"loss": outputs[0].mean() * (float("inf") if self.bad in batch.ids.tolist() else 1.0)}


def train_exploding_on_this_rank(folder: str, store: str, on_host: bool) -> str:
    with mock.patch.object(update_guard, "is_host_memory", return_value=on_host):
        return _train_exploding(folder, store)


def _train_exploding(folder: str, store: str) -> str:
    context = StageContext.create(recipes.recipe(Path(folder)), Store.open(Path(store)), on_ray=False)
    stage: Any = context.recipe.stages["pretrain"]
    job = pretrain_job.build_job(context, stage, StageInstance("pretrain", 0, "f", Path(folder) / "job"))
    bad = int(job.plan.slice(0, 1, 1, 2)[0][0])
    try:
        fit(job, LearnerExplodingOnImage(bad))
    except StopTraining as stop:
        return str(stop)
    return "went on"


@pytest.mark.fault(37, "a loss that is not finite on one of two workers")
@pytest.mark.parametrize("on_host", [True, False])
def test_nonfinite_loss_of_one_worker_stops_all(pool: Pool, tmp_path: Path, digits: Store, on_host: bool) -> None:
    answers = pool.run(train_exploding_on_this_rank, str(tmp_path), str(digits.path), on_host)
    assert answers[0] == answers[1]
    assert "step 1 is not finite" in answers[0]
    assert "Its 16 image ids" in answers[0]


def read_first_loss(folder: Path) -> float:
    return float(read_metrics(folder / "job" / METRICS_FILE)[0]["loss"])


def test_channels_last_changes_only_rounding(tmp_path: Path, digits: Store) -> None:
    _, plain = train(tmp_path / "plain", digits, stages__pretrain__epochs=1)
    _, other = train(tmp_path / "other", digits, stages__pretrain__epochs=1, stages__pretrain__channels_last=True)
    for name, weight in plain.items():
        if weight.is_floating_point():  # counts of images that changed targets tell of ties that rounding may turn
            torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-4)


def test_bf16_training_has_float32_weights_and_similar_loss(tmp_path: Path, digits: Store) -> None:
    train(tmp_path / "plain", digits, stages__pretrain__epochs=1)
    _, weights = train(tmp_path / "bf16", digits, stages__pretrain__epochs=1, stages__pretrain__precision="bf16")
    assert {w.dtype for w in weights.values()} == {torch.float32, torch.int64}
    assert read_first_loss(tmp_path / "bf16") == pytest.approx(read_first_loss(tmp_path / "plain"), rel=0.02)
    assert read_first_loss(tmp_path / "bf16") != read_first_loss(tmp_path / "plain")


def test_fp16_training_has_float32_weights_and_a_scaled_loss(tmp_path: Path, digits: Store) -> None:
    train(tmp_path / "plain", digits, stages__pretrain__epochs=1)
    clipped = {"stages__pretrain__precision": "fp16", "stages__pretrain__clip_norm": 0.5}
    clean, weights = train(tmp_path / "fp16", digits, **clipped)
    assert {w.dtype for w in weights.values()} == {torch.float32, torch.int64}
    assert read_first_loss(tmp_path / "fp16") == pytest.approx(read_first_loss(tmp_path / "plain"), rel=0.02)
    assert read_first_loss(tmp_path / "fp16") != read_first_loss(tmp_path / "plain")
    found, _ = Checkpoints(tmp_path / "fp16" / "job" / "checkpoints").read_newest()
    assert found is not None
    assert found.shared["scaler"]["scale"] > 1.0
    with pytest.raises(Stopped):
        train(tmp_path / "stopped", digits, 4, **clipped)
    assert train(tmp_path / "stopped", digits, **clipped)[0] == clean


def test_step_that_overflows_in_fp16_is_skipped(tmp_path: Path, digits: Store) -> None:
    """The first scale is lowered until the gradient is finite: no weight becomes infinite on the way."""
    changes = {"stages__pretrain__precision": "fp16", "stages__pretrain__optimizer__lr": 1e-4}
    context = StageContext.create(recipes.recipe(tmp_path, **changes), digits, on_ray=False)
    stage: Any = context.recipe.stages["pretrain"]
    job = pretrain_job.build_job(context, stage, StageInstance("pretrain", 3, "f", tmp_path / "job"))
    trainer = Trainer(job, pretrain_job.build_seeded_method(context, stage, job))
    trainer.backward.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {name: weight.clone() for name, weight in trainer.learner.named_parameters()}
    stream, _ = open_batches(job, TrainOrder(job.plan, 0, 1, 0, 1), trainer.num_rows)
    batch = to_batch(next(iter(stream)), job.device, job)
    trainer.step(batch, 0)
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.learner.named_parameters())
    assert trainer.backward.scaler.get_scale() == 2.0**39


@pytest.mark.parametrize("accumulate", [1, 4])
def test_averaged_weights_are_resumed_bit_identical_and_handed_on(
    tmp_path: Path, digits: Store, accumulate: int
) -> None:
    changes = {"stages__pretrain__ema": 0.9, "encoder__norm": "batch", "stages__pretrain__accumulate": accumulate}
    clean, weights = train(tmp_path / "clean", digits, **changes)
    _, plain = train(tmp_path / "plain", digits, **{**changes, "stages__pretrain__ema": None})
    found, _ = Checkpoints(tmp_path / "clean" / "job" / "checkpoints").read_newest()
    assert found is not None
    for name, value in found.shared["average"].items():
        assert torch.equal(weights[name], value)
    for name, value in plain.items():
        assert torch.equal(found.shared["model"][name], value), "the average changes no step"
    assert not torch.equal(weights["encoder.stages.0.0.weight"], plain["encoder.stages.0.0.weight"])
    for stop in (1, 4):
        with pytest.raises(Stopped):
            train(tmp_path / str(stop), digits, stop, **changes)
        again, handed_on = train(tmp_path / str(stop), digits, **changes)
        assert again == clean
        assert all(torch.equal(handed_on[name], weight) for name, weight in weights.items())


def test_layer_decay_slows_shallow_layers_of_a_pretraining(tmp_path: Path, digits: Store) -> None:
    changes = {"stages__pretrain__layer_decay": 0.5, "stages__pretrain__epochs": 1, "encoder__depth": 3}
    train(tmp_path, digits, **changes)
    found, _ = Checkpoints(tmp_path / "job" / "checkpoints").read_newest()
    assert found is not None
    rates = [group["initial_lr"] for group in found.shared["optimizer"]["param_groups"]]
    assert [rate / rates[0] for rate in rates] == [1.0, 1.0, 0.5, 0.25]


CONTRAST = {  # couples all images of a batch, smoothly: rounding cannot be blown up by an assignment that flips
    "encoder__norm": "group",
    "stages__pretrain__method": {"name": "spatial_contrasting", "patch_size": 1},
}


def test_gradient_cache_equals_whole_batch(tmp_path: Path, digits: Store) -> None:
    """Averaged gradients of parts would differ: each anchor would be contrasted with its own part only."""
    _, whole = train(tmp_path / "whole", digits, **CONTRAST)
    for parts in (2, 8):
        _, weights = train(tmp_path / str(parts), digits, **CONTRAST, stages__pretrain__accumulate=parts)
        for name, weight in whole.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5)
    ends = {stop: read_metrics(tmp_path / stop / "job" / METRICS_FILE)[-1] for stop in ("whole", "8")}
    assert ends["8"]["loss"] == pytest.approx(ends["whole"]["loss"], rel=1e-5)


def train_parts_on_this_rank(folder: str, store: str) -> dict[str, Tensor]:
    return train(Path(folder), Store.open(Path(store)), **CONTRAST, stages__pretrain__accumulate=4)[1]


def test_gradient_cache_on_two_workers_equals_whole_batch_on_one(pool: Pool, tmp_path: Path, digits: Store) -> None:
    _, whole = train(tmp_path / "whole", digits, **CONTRAST)
    for weights in pool.run(train_parts_on_this_rank, str(tmp_path / "two"), str(digits.path)):
        for name, weight in whole.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5)


def test_resumed_training_with_gradient_cache_is_bit_identical(tmp_path: Path, digits: Store) -> None:
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
def test_plateau_schedule_is_bit_identical_after_resume(tmp_path: Path, digits: Store, interval: str) -> None:
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


def test_weight_decay_goes_to_its_end_by_half_a_cosine_and_is_resumed(tmp_path: Path, digits: Store) -> None:
    decayed = {"name": "SGD", "lr": 0.5, "momentum": 0.9, "weight_decay": 0.04, "weight_decay_end": 0.4}
    changes = {"stages__pretrain__optimizer": decayed}
    seen = list[tuple[float, ...]]()
    set_decay = Trainer._set_weight_decay

    def record(trainer: Trainer, step: int) -> None:
        set_decay(trainer, step)
        seen.append(tuple(group["weight_decay"] for group in trainer.optimizer.param_groups))

    with mock.patch.object(Trainer, "_set_weight_decay", record):
        whole = train(tmp_path / "whole", digits, **changes)
    steps = len(seen)
    wanted = [0.04 + (0.4 - 0.04) * (1 - np.cos(np.pi * step / steps)) / 2 for step in range(steps)]
    np.testing.assert_allclose([max(decays) for decays in seen], wanted, rtol=1e-12)
    assert {min(decays) for decays in seen} == {0.0}, "biases and normalisations stay without"
    with pytest.raises(Stopped):
        train(tmp_path / "parts", digits, 3, **changes)
    resumed = train(tmp_path / "parts", digits, **changes)
    assert resumed[0] == whole[0]
    constant = train(tmp_path / "constant", digits, stages__pretrain__optimizer={**decayed, "weight_decay_end": None})
    assert constant[0] != whole[0]
