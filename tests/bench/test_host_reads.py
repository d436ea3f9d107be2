"""No step reads a value on the host: counted in the loop, and shown on tensors that have no values."""

import contextlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import host_reads
from bench.host_reads import READ_BATCH, HostReads, count_case_reads, make_reads_table
from bench.training_cases import METHOD_TRAININGS, TASK_TRAININGS, TrainingCase, build_case_job, make_noise_batch
from firstlight.pipeline.train.trainer import Trainer
from firstlight.pipeline.train.training_job import to_batch
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.pretrain import METHODS
from firstlight.tasks.self_distillation import patch_masks
from tests.support.gloo import Pool

# Torchvision's detector selects boxes by what it has predicted, with results of unknown sizes.
READING_TASKS = ("detect",)
CASES = [case for case in (*METHOD_TRAININGS, *TASK_TRAININGS) if case.kind not in READING_TASKS]
META = torch.device("meta")


def name_case(case: TrainingCase) -> str:
    return case.name


@pytest.fixture(autouse=True)
def _few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of patches are made of few blocks: each is tried by the same operators as the one before."""
    monkeypatch.setattr(patch_masks, "MASK_TRIES", 4)


def test_every_method_and_task_is_counted() -> None:
    assert {case.kind for case in METHOD_TRAININGS} == set(METHODS)
    assert {case.kind for case in TASK_TRAININGS} == set(TASKS)


@pytest.mark.parametrize("case", CASES, ids=name_case)
def test_no_step_reads_a_value_on_the_host(case: TrainingCase) -> None:
    assert count_in_short_epochs(case) == (0.0, {})


def shorten_epochs(steps: int) -> contextlib.AbstractContextManager[object]:
    """Returns a block in which epochs have so many steps, of which the first is not counted."""
    return mock.patch.object(host_reads, "READ_IMAGES", steps * READ_BATCH)


def count_in_short_epochs(case: TrainingCase) -> tuple[float, Counter[str]]:
    """Counts the second step of two epochs."""
    with shorten_epochs(2):
        return count_case_reads(case)


def count_on_this_rank(name: str) -> tuple[float, Counter[str]]:
    return count_in_short_epochs(next(case for case in CASES if case.name == name))


@pytest.mark.parametrize("name", ["nat", "super_and", "super_and, sampled", "flexmatch"])
def test_no_step_of_two_workers_reads_a_value_on_the_host(pool: Pool, name: str) -> None:
    """Each worker has a part of every table, and would have to know which rows of a batch are its own."""
    assert pool.run(count_on_this_rank, name) == [(0.0, {})] * 2


def test_exchange_of_targets_reads_once_and_twice_with_the_sparse_solver() -> None:
    """The costs go to the host, where the assignment is solved; `sparse` reads its bound as well."""
    exact, sparse = METHOD_TRAININGS[:2]
    with shorten_epochs(4):
        assert count_case_reads(exact, permutes=True) == (1.0, {"cpu": 2})
        assert count_case_reads(sparse, permutes=True) == (2.0, {"cpu": 2, "_local_scalar_dense": 2})


@pytest.mark.parametrize("case", CASES, ids=name_case)
def test_step_runs_on_tensors_without_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: TrainingCase
) -> None:
    """On the device `meta` a read raises, in networks, losses, tables, the optimiser, averages and the guard alike."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    options = {"epochs": 2, "batch_size": 8, "optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.9}, "ema": 0.9}
    job = build_case_job(tmp_path, {**options, "clip_norm": 1.0}, 32, META)
    trainer = Trainer(job, case.build_learner(32, 32, 2, 8))
    if case.kind == "nat":
        # Epoch 1 is no epoch that exchanges targets.
        trainer.learner.begin_epoch(1)
    arrays = make_noise_batch(case, 32, np.arange(8), np.zeros(8, np.int64))
    for step in range(2):
        losses = trainer.step(to_batch(arrays, META, job), step)
        assert {loss.device for loss in losses.values()} == {META}
    with pytest.raises((RuntimeError, NotImplementedError)):
        losses["loss"].item()


def read_list(x: Tensor) -> object:
    return x.tolist()


READS: dict[str, Callable[[Tensor], Any]] = {
    "_local_scalar_dense": lambda x: float(x.sum()) if x.sum() > 1e9 else 0.0,
    "tolist": read_list,
    "cpu": lambda x: x.cpu().numpy(),
    "to(cpu)": lambda x: x.to("cpu").tolist(),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "_unique2": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "bincount": lambda x: x.long().bincount(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "index by a mask": lambda x: x[x > 0],
    "index_put_ by a mask": lambda x: x.clone().__setitem__(x > 0, torch.ones(3)),
}


@pytest.mark.parametrize("name", READS)
def test_every_kind_of_read_is_counted_once(name: str) -> None:
    x, reads = torch.tensor([1.0, 2.0, 3.0]), HostReads()
    with reads.counting():
        READS[name](x)
    assert reads.counts == {name: 1}


def test_work_on_the_device_is_not_counted() -> None:
    x, reads = torch.ones(3), HostReads()
    with reads.counting():
        torch.where(x > 0, x, 0.0).to(torch.float64)[torch.tensor([0, 2])].sort()
    assert not reads.counts


def test_table_has_a_row_for_each_training() -> None:
    with shorten_epochs(2):
        table = make_reads_table([METHOD_TRAININGS[10], TASK_TRAININGS[0]])
    assert [*table.columns[0].cells] == ["simclr", "classify"]
    assert [*table.columns[1].cells] == ["0.00", "0.00"]
