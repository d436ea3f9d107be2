from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.training_cases import METHOD_TRAININGS, TASK_TRAININGS, make_noise_batch
from firstlight.pipeline.train.training_job import to_batch
from firstlight.tasks.learner import Batch, Learner
from firstlight.tasks.sample_table import SampleTable
from tests.support.batches import image_batch, mask_batch


class Mean(Learner):
    """Learns a scale of the images' means, and stores the means in a table."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.frozen = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1), requires_grad=False)
        self.tables["means"] = SampleTable(10, (), torch.float32, lambda rows: torch.zeros(len(rows)))

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        return (self.scale * batch.views[0].mean((1, 2, 3)),)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        self.tables["means"].write(batch.rows, outputs[0])
        return {"loss": outputs[0].mean()}


def test_range_of_a_batch_cuts_every_tensor() -> None:
    batch = image_batch(torch.arange(6), views=2, ids=10 + torch.arange(6), labels=torch.arange(6) % 3)
    part = batch.select_range(2, 5)
    assert (part.ids.tolist(), part.rows.tolist(), part.labels.tolist()) == ([12, 13, 14], [2, 3, 4], [2, 0, 1])
    assert len(part.passes) == 3
    for view, whole in zip(part.views, batch.views, strict=True):
        assert torch.equal(view, whole[2:5])


def test_range_of_a_batch_cuts_targets() -> None:
    batch = mask_batch(4)
    assert torch.equal(batch.select_range(1, 3).targets["mask"], batch.targets["mask"][1:3])


def test_forward_is_the_loss_of_the_embedding() -> None:
    learner, batch = Mean(), image_batch(torch.arange(4))
    assert torch.equal(learner(batch)["loss"], batch.views[0].mean((1, 2, 3)).mean())


def test_table_writes_are_visible_after_the_step() -> None:
    learner, batch = Mean(), image_batch(torch.arange(4))
    learner(batch)
    assert not learner.tables["means"].values.any()
    learner.end_step()
    assert torch.equal(learner.tables["means"].read(batch.rows), batch.views[0].mean((1, 2, 3)))


def test_frozen_parameters_are_in_no_group() -> None:
    learner = Mean()
    ((factor, parameters),) = learner.parameter_groups()
    assert factor == 1.0
    assert parameters == [learner.scale]


def test_tables_move_with_the_parameters() -> None:
    learner = Mean()
    learner.move_to_device(torch.device("meta"))
    assert {learner.scale.device.type, learner.tables["means"].values.device.type} == {"meta"}


NETWORKS = {
    "byol": {"encoder", "projector", "predictor", "target_encoder.network", "target_projector.network"},
    "mae": {"encoder", "decoder"},
    "nat": {"encoder", "head"},
    "fixmatch": {"encoder", "classifier"},
    "detect": {"encoder"},
    "segment": {"encoder", "head"},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_networks_are_the_learner_s_own(name: str) -> None:
    case = next(case for case in (*METHOD_TRAININGS, *TASK_TRAININGS) if case.name == name)
    learner = case.build_learner(32, 16, 2, 4)
    names = {id(module): key for key, module in learner.named_modules()}
    assert {names[id(network)] for network in learner.list_networks()} == NETWORKS[name]


@pytest.mark.parametrize("name", ["simclr", "byol", "mae", "distill"])
def test_compiled_networks_have_the_same_loss_and_the_same_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by torch's compiler, and run as traced: its backend for CPUs takes minutes."""
    compiled: list[object] = []
    original = torch.compile

    def trace(function: Any, **options: Any) -> Any:
        compiled.append(function)
        return original(function, backend="eager")

    monkeypatch.setattr(torch, "compile", trace)
    case = next(case for case in METHOD_TRAININGS if case.name == name)
    losses, keys = [], []
    for compiles in (False, True):
        learner = case.build_learner(32, 16, 2, 4)
        if compiles:
            learner.compile_networks()
        arrays = make_noise_batch(case, 32, np.arange(8), np.zeros(8, np.int64))
        learner.train().begin_epoch(0)
        torch.manual_seed(0)
        losses.append(float(learner(to_batch(arrays, torch.device("cpu")))["loss"]))
        keys.append([*learner.state_dict()])
    # The pass of visible patches of MAE is compiled, too, and so is the teacher of a distillation.
    assert len(compiled) == len(learner.list_networks()) + (name == "mae")
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert keys[0] == keys[1]
