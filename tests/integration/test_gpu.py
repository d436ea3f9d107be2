"""The promises about a GPU, where one is: no step waits for it, its pixels are those of the CPU, and a step whose loss
is not finite changes nothing. These tests need neither Ray nor MLflow.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import training_cases
from bench.host_reads import READ_BATCH, READ_IMAGE_SIDE
from bench.training_cases import METHOD_TRAININGS, TASK_TRAININGS, TrainingCase, build_case_job, feed_noise
from firstlight.pipeline.data.loader import Loader
from firstlight.pipeline.data.plan import BatchPlan
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.stream import LoadingOptions, TrainOrder, stream_batches
from firstlight.pipeline.errors import Paused, StopTraining
from firstlight.pipeline.train import device_cache, failures
from firstlight.pipeline.train.loop import fit
from tests.support.augmentations import PIPELINES
from tests.support.photograph_folders import prepare_photographs, write_photographs

# Torchvision's detector selects boxes by what it has predicted, with results of unknown sizes.
CASES = [case for case in (*METHOD_TRAININGS, *TASK_TRAININGS) if case.kind != "detect"]
STEPS, EPOCHS = 6, 4
GPU_BATCH, GPU_SIDE = 12, 16


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def no_hook() -> Iterator[None]:
    yield
    failures.fault_hook = None
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


def train_case(
    case: TrainingCase, folder: Path, device: torch.device, pause_after: int | None = None
) -> dict[str, Tensor]:
    """Trains on noise and returns the learner's state, also where the training is stopped."""
    options = {
        "steps": EPOCHS * STEPS,
        "batch_size": READ_BATCH,
        "optimizer": {"name": "SGD", "lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4},
        "precision": "auto",
        # Log lines and checkpoints are at the end alone.
        "log_every": 10**9,
        "checkpoint_every": 10**9,
    }
    images = STEPS * READ_BATCH
    with feed_noise(case, READ_IMAGE_SIDE):
        job = replace(build_case_job(folder, options, images, device), pause_after=pause_after)
        learner = case.build_learner(READ_IMAGE_SIDE, images, EPOCHS, EPOCHS * STEPS)
        with contextlib.suppress(Paused, StopTraining):
            fit(job, learner)
    return {name: value.detach().cpu().clone() for name, value in learner.state_dict().items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_step_waits_for_the_gpu(case: TrainingCase, gpu: torch.device, tmp_path: Path) -> None:
    """CUDA raises an error at a place where the host waits, but in the first step of an epoch, and where targets are
    exchanged.
    """

    def watch_next_step(rank: int, done: int) -> None:
        epoch, place = divmod(done, STEPS)
        exchanges = case.kind == "nat" and epoch % 3 == 0
        is_watched = epoch > 0 and place > 0 and done < EPOCHS * STEPS - 1 and not exchanges
        torch.cuda.set_sync_debug_mode("error" if is_watched else "default")

    failures.fault_hook = watch_next_step
    found = train_case(case, tmp_path / "job", gpu)
    assert all(torch.isfinite(value).all() for value in found.values() if value.is_floating_point())


@pytest.mark.parametrize("name", ["simclr", "nat", "super_and", "byol", "mae"])
def test_step_whose_loss_is_not_finite_changes_nothing_on_a_gpu(name: str, gpu: torch.device, tmp_path: Path) -> None:
    """The fourteenth step has a pixel that is no number. The host sees it at the end."""
    case = next(case for case in CASES if case.name == name)
    good = 2 * STEPS + 1
    paused = train_case(case, tmp_path / "paused", gpu, pause_after=good)
    real, done = training_cases.make_noise_batch, [0]

    def make_batch(case: TrainingCase, size: int, ids: np.ndarray, passes: np.ndarray) -> dict[str, Any]:
        arrays = real(case, size, ids, passes)
        if done[-1] >= good:
            arrays["views"] = arrays["views"].astype(np.float32) * np.float32("nan")
        return arrays

    failures.fault_hook = lambda rank, step: done.append(step)
    with mock.patch.object(training_cases, "make_noise_batch", make_batch), feed_floats():
        found = train_case(case, tmp_path / "job", gpu)
    assert done[-1] > good, "the host does not see it at once"
    assert found.keys() == paused.keys()
    assert all(torch.equal(found[key], paused[key]) for key in paused)


def feed_floats() -> Any:
    """Returns a block in which pixels that are floats already stay as they are."""
    from firstlight.pipeline.train import training_job

    scale: Callable[..., Tensor] = training_job.scale_pixels

    def scale_levels(levels: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        if levels.is_floating_point():
            return levels.permute(0, 3, 1, 2).contiguous(memory_format=layout)
        return scale(levels, layout)

    return mock.patch.object(training_job, "scale_pixels", scale_levels)


@pytest.mark.parametrize("name", PIPELINES)
def test_batches_are_those_of_the_cpu(name: str, gpu: torch.device, tmp_path: Path) -> None:
    """Held decoded by the process or streamed to the GPU: images of several sizes, cropped here and augmented there."""
    store: Store = prepare_photographs(write_photographs(tmp_path / "photographs", 60), tmp_path / "stores", 48)
    loader = Loader(store, (tuple(PIPELINES[name]),) * 2, GPU_SIDE, 0, 1_000_000)
    rows = store.list_row_groups("train")[:, 2]
    plan = BatchPlan(store.ids("train"), rows, GPU_BATCH, 0, 3 * GPU_BATCH, False)
    order = TrainOrder(plan, 0, 1, 0, plan.steps)
    options = LoadingOptions(on_ray=False, prefetch=2, tasks=3, task_cpus=0.25, resident=store.ids("train"))
    expected = list(stream_batches(loader, order, GPU_BATCH, options))
    held, _ = device_cache.cache_images(loader, options, gpu)
    on_device = replace(options, on_device=True)
    for found in (
        device_cache.iterate_cached_batches(held, loader, order, options),
        device_cache.iterate_streamed_batches(loader, order, GPU_BATCH, on_device, gpu),
    ):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours["views"].device.type == "cuda"
            assert np.array_equal(ours["id"], theirs["id"])
            assert np.array_equal(ours["views"].cpu().numpy(), theirs["views"])
