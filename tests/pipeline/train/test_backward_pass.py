"""Losses and gradients of a batch: those of its parts are those of the whole, and a refused loss leaves none."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.training_cases import METHOD_TRAININGS, TASK_TRAININGS, TrainingCase, build_case_job, make_noise_batch
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.stream import TrainOrder
from firstlight.pipeline.errors import StopTraining
from firstlight.pipeline.stages.pretraining import job as pretrain_job
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.backward_pass import (
    BackwardPass,
    choose_formats,
    find_autocast,
    resolve_precision,
    seed_generators,
)
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.loop import fit, open_batches
from firstlight.pipeline.train.training_job import to_batch
from firstlight.tasks.learner import Batch
from tests.support import recipes


def open_pass(folder: Path, store: Store, judge_loss: Any, **changes: Any) -> tuple[BackwardPass, Batch]:
    """Returns the backward pass of a small pretraining, and its first batch."""
    context = StageContext.create(recipes.recipe(folder, encoder__norm="group", **changes), store, on_ray=False)
    stage: Any = context.recipe.stages["pretrain"]
    job = pretrain_job.build_job(context, stage, StageInstance("pretrain", 3, "f", folder / "job"))
    learner = pretrain_job.build_seeded_method(context, stage, job)
    learner.begin_step(0)
    stream, _ = open_batches(job, TrainOrder(job.plan, 0, 1, 0, 1), job.plan.batch_size)
    return BackwardPass(job, learner, judge_loss), to_batch(next(iter(stream)), job.device, job)


def read_gradients(backward: BackwardPass) -> dict[str, Tensor]:
    return {name: p.grad for name, p in backward.learner.named_parameters() if p.grad is not None}


def test_parts_of_a_batch_have_the_losses_and_the_gradient_of_the_whole(tmp_path: Path, digits: Store) -> None:
    judged = list[float]()
    found = []
    for parts in (1, 4):
        # A layer that normalises over the batch would see its parts.
        changes = {"stages__pretrain__accumulate": parts, "stages__pretrain__method__hidden": []}
        backward, batch = open_pass(
            tmp_path / str(parts), digits, lambda loss, *_: judged.append(float(loss.detach())), **changes
        )
        losses = backward.compute_gradients(batch, 0)
        found.append((float(losses["loss"].detach()), read_gradients(backward)))
    (whole, gradients), (parted, others) = found
    assert parted == pytest.approx(whole, rel=1e-5)
    assert judged == [whole, parted]
    assert gradients.keys() == others.keys()
    flat, other = (torch.cat([one[name].flatten() for name in gradients]) for one in (gradients, others))
    assert float((flat - other).norm()) < 1e-3 * float(flat.norm())


def compute_case(case: TrainingCase, folder: Path, precision: str) -> tuple[float, Tensor]:
    """Returns the loss of the first batch of noise, and its gradient in all parameters."""
    options = {"epochs": 2, "batch_size": 8, "optimizer": {"name": "SGD", "lr": 0.1}, "precision": precision}
    job = build_case_job(folder, options, 32, torch.device("cpu"))
    learner = case.build_learner(32, 32, 2, 8).train()
    learner.begin_epoch(0)
    learner.begin_step(0)
    ids, passes = job.plan.slice(0, 0, 0, 1)
    batch = to_batch(make_noise_batch(case, 32, np.array(ids), np.array(passes)), job.device, job)
    backward = BackwardPass(job, learner, lambda *arguments: None)
    loss = float(backward.compute_gradients(batch, 0)["loss"].detach())
    return loss, torch.cat([gradient.flatten() for gradient in read_gradients(backward).values()])


@pytest.mark.parametrize("case", [*METHOD_TRAININGS, *TASK_TRAININGS], ids=lambda case: case.name)
def test_bfloat16_has_nearly_the_loss_and_the_gradient_of_single_precision(tmp_path: Path, case: TrainingCase) -> None:
    (exact, gradient), (loss, other) = (compute_case(case, tmp_path, precision) for precision in ("fp32", "bf16"))
    assert loss == pytest.approx(exact, rel=0.01)
    assert loss != exact
    # Images of noise have nearly equal features, and rounding gives some of them other targets of NAT.
    least = 0.5 if case.kind == "nat" else 0.95
    assert float(torch.cosine_similarity(gradient.double(), other.double(), dim=0)) > least


@pytest.mark.parametrize("parts", [1, 4])
def test_loss_that_is_refused_leaves_no_gradient(tmp_path: Path, digits: Store, parts: int) -> None:
    def refuse(loss: Tensor, batch: Batch, step: int) -> None:
        raise StopTraining(f"step {step} of {len(batch.ids)} images")

    backward, batch = open_pass(tmp_path, digits, refuse, stages__pretrain__accumulate=parts)
    with pytest.raises(StopTraining, match=f"step 7 of {len(batch.ids)} images"):
        backward.compute_gradients(batch, 7)
    assert not read_gradients(backward)


@pytest.mark.parametrize(
    ("autocast", "device", "expected"),
    [
        (None, "cpu", torch.bfloat16),
        (torch.float16, "cpu", torch.bfloat16),
        (torch.bfloat16, "cpu", torch.float32),
        (torch.bfloat16, "cuda", torch.bfloat16),
    ],
)
def test_grouped_convolutions_leave_bfloat16_on_cpus(
    autocast: torch.dtype | None, device: str, expected: torch.dtype
) -> None:
    network, images = nn.Conv2d(4, 4, 3, groups=4), torch.rand(2, 4, 8, 8)
    with choose_formats(network, autocast, torch.device(device)), torch.autocast("cpu", torch.bfloat16):
        assert network(images).dtype == expected


@pytest.mark.parametrize(("precision", "expected"), [("fp32", "Conv2d"), ("bf16", "SinglePrecisionConv2d")])
def test_training_chooses_the_formats_of_layers_until_its_end(
    tmp_path: Path, digits: Store, precision: str, expected: str
) -> None:
    changes = {"encoder__norm": "group", "stages__pretrain__precision": precision, "stages__pretrain__epochs": 1}
    context = StageContext.create(recipes.recipe(tmp_path, **changes), digits, on_ray=False)
    stage: Any = context.recipe.stages["pretrain"]
    job = pretrain_job.build_job(context, stage, StageInstance("pretrain", 3, "f", tmp_path / "job"))
    learner = pretrain_job.build_seeded_method(context, stage, job)
    learner.grouped = nn.Conv2d(4, 4, 3, groups=4)
    seen = set[str]()
    begin_step = learner.begin_step
    learner.begin_step = lambda step: (seen.add(type(learner.grouped).__name__), begin_step(step))[1]
    fit(job, learner)
    assert seen == {expected}
    assert type(learner.grouped) is nn.Conv2d


@pytest.mark.parametrize(("device", "resolved"), [("cpu", "fp32"), ("cuda", "bf16"), ("old", "fp16")])
def test_automatic_precision_is_the_best_of_the_device(
    monkeypatch: pytest.MonkeyPatch, device: str, resolved: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: device == "cuda")
    place = torch.device("cpu" if device == "cpu" else "cuda")
    assert resolve_precision("auto", place) == resolved
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"
    dtypes = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert find_autocast("auto", place) == dtypes[resolved]


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_random_numbers_of_a_seed_are_those_of_torch_s_own_function(seed: int) -> None:
    torch.manual_seed(seed)
    expected = torch.rand(3)
    seed_generators(seed, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)
