"""A step whose loss is not finite changes nothing, as the host sees it (on a CPU) and as a device undoes it."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.training_cases import METHOD_TRAININGS, TASK_TRAININGS, TrainingCase, build_case_job, make_noise_batch
from firstlight.pipeline.errors import StopTraining
from firstlight.pipeline.train import update_guard
from firstlight.pipeline.train.trainer import Trainer
from firstlight.pipeline.train.training_job import to_batch
from firstlight.pipeline.train.update_guard import TensorCopies
from tests.support.state_hash import hash_state

SIDE, IMAGES, BATCH = 32, 32, 8
CASES = {case.name: case for case in (*METHOD_TRAININGS, *TASK_TRAININGS)}
SGD = {"name": "SGD", "lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
ADAMW = {"name": "AdamW", "lr": 1e-3, "weight_decay": 0.1}


@pytest.fixture(params=["host", "device"])
def verdict(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The reader of the loss: the host, as on a CPU, or, as on a GPU, nobody before a log line."""
    monkeypatch.setattr(update_guard, "is_host_memory", lambda device: request.param == "host")
    return str(request.param)


def build_trainer(case: TrainingCase, folder: Path, **options: Any) -> Trainer:
    torch.manual_seed(0)
    options = {"epochs": 2, "batch_size": BATCH, "optimizer": SGD, **options}
    job = build_case_job(folder, options, IMAGES, torch.device("cpu"))
    job.folder.mkdir(parents=True)
    trainer = Trainer(job, case.build_learner(SIDE, IMAGES, 2, 8))
    trainer.learner.begin_epoch(0)
    return trainer


def take_step(trainer: Trainer, case: TrainingCase, step: int, factor: float = 1.0) -> None:
    """Takes a step on images whose pixels are multiplied by `factor`: with NaN, everything computed of them is NaN."""
    ids, passes = trainer.job.plan.slice(0, step % trainer.job.plan.steps, 0, 1)
    batch = to_batch(make_noise_batch(case, SIDE, np.array(ids), np.array(passes)), trainer.job.device, trainer.job)
    trainer.step(dataclasses.replace(batch, views=tuple(view * factor for view in batch.views)), step)


def hash_trainer(trainer: Trainer) -> str:
    average = trainer.average
    return hash_state(
        [
            trainer.learner.state_dict(),
            trainer.optimizer.state_dict()["state"],
            {name: table.values for name, table in trainer.learner.tables.items()},
            average.values if average is not None else {},
        ]
    )


@pytest.mark.fault(37, "a loss that is not finite changes nothing, in any part of the state")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nat", {"optimizer": ADAMW, "ema": 0.9}),
        ("super_and", {}),
        ("byol", {"ema": 0.9}),
        ("dino", {"optimizer": ADAMW}),
        ("flexmatch", {"accumulate": 2}),
        ("freematch", {"precision": "bf16"}),
        ("dae", {"optimizer": {"name": "lamb", "lr": 1e-3}}),
        ("segment", {"clip_norm": 1.0}),
    ],
)
def test_nonfinite_step_changes_no_bit_of_the_state(
    tmp_path: Path, verdict: str, name: str, options: dict[str, Any]
) -> None:
    case = CASES[name]
    trainer = build_trainer(case, tmp_path / "job", **options)
    for step in range(2):
        take_step(trainer, case, step)
    before = hash_trainer(trainer)
    if verdict == "host":
        with pytest.raises(StopTraining, match=r"the loss of step 2 is not finite; nothing was updated by it"):
            take_step(trainer, case, 2, float("nan"))
    else:
        take_step(trainer, case, 2, float("nan"))
        # Nothing is made of the steps that follow before the host asks.
        take_step(trainer, case, 3)
        with pytest.raises(StopTraining, match=r"the loss of step 2 is not finite; nothing was updated by it"):
            trainer.stop_unless_finite()
    assert hash_trainer(trainer) == before
    assert trainer.num_done == 2


@pytest.mark.parametrize("name", ["nat", "super_and", "byol"])
def test_finite_steps_are_the_same_to_the_last_bit_whoever_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ends = []
    for on_host in (True, False):
        monkeypatch.setattr(update_guard, "is_host_memory", lambda device, on_host=on_host: on_host)
        trainer = build_trainer(CASES[name], tmp_path / str(on_host), ema=0.9)
        for step in range(3):
            take_step(trainer, CASES[name], step)
        trainer.stop_unless_finite()
        ends.append(hash_trainer(trainer))
    assert ends[0] == ends[1]


@pytest.mark.fault(37, "the step and the ids of a loss that is not finite are told later")
def test_first_nonfinite_step_is_reported_before_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_guard, "is_host_memory", lambda device: False)
    case = CASES["classify"]
    trainer = build_trainer(case, tmp_path / "job")
    for step, factor in enumerate((1.0, float("inf"), float("nan"), 1.0)):
        take_step(trainer, case, step, factor)
    ids = np.sort(trainer.job.plan.epoch(0)[1]).tolist()
    with pytest.raises(StopTraining, match=f"the loss of step 1 is not finite.* Its 8 image ids: {ids[0]}, {ids[1]}"):
        trainer.save_checkpoint(4)
    assert not (tmp_path / "job" / "checkpoints").exists()


def test_fused_optimizer_leaves_the_update_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reads `found_inf`; the copies are without what it changes."""
    monkeypatch.setattr(update_guard, "is_host_memory", lambda device: False)
    case = CASES["byol"]
    trainer = build_trainer(case, tmp_path / "job", optimizer={**SGD, "fused": True})
    assert trainer.guard.is_fused
    for step in range(2):
        take_step(trainer, case, step)
    before = hash_trainer(trainer)
    copied = {tensor.data_ptr() for tensor in trainer.guard._copies.tensors}  # type: ignore[union-attr]
    trained = {p.data_ptr() for p in trainer.learner.parameters() if p.requires_grad}
    assert copied
    assert not copied & trained
    take_step(trainer, case, 2, float("nan"))
    take_step(trainer, case, 3)
    assert hash_trainer(trainer) == before


@pytest.mark.parametrize("flag", [False, True])
def test_copies_are_restored_bit_by_bit_where_the_flag_is_true(flag: bool) -> None:
    tensors = [
        torch.tensor([1.0, -0.0, float("nan"), float("inf")]),
        torch.randn(3, 4, dtype=torch.float64).T,
        torch.randn(5).half(),
        torch.tensor(2**60 + 1),
        torch.tensor([True, False]),
        nn.Parameter(torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last)),
    ]
    copies = TensorCopies(tensors)
    kept = copy.deepcopy([tensor.detach() for tensor in tensors])
    copies.keep_values()
    changed: list[Tensor] = []
    for tensor in tensors:
        with torch.no_grad():
            tensor.copy_(tensor.double() * float("nan") if tensor.is_floating_point() else ~tensor)
        changed.append(tensor.detach().clone())
    copies.restore_where(torch.tensor(flag))
    for tensor, expected in zip(tensors, kept if flag else changed, strict=True):
        assert hash_state(tensor.detach().contiguous()) == hash_state(expected.contiguous())
