"""Trainings of a recipe with their times: the whole loop, and its bare step on a batch that is on the device."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.optim import build_optimizer
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.data.stream import TrainOrder
from firstlight.pipeline.stages import pretrain, registry  # noqa: F401 - registers the kinds of stages
from firstlight.pipeline.stages.pretraining import job as pretrain_job
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train import failures
from firstlight.pipeline.train.accelerator.fused_updates import choose_fused
from firstlight.pipeline.train.backward_pass import choose_formats, find_autocast
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.loop import fit, open_batches
from firstlight.pipeline.train.metrics import METRICS_FILE, read_metrics
from firstlight.pipeline.train.training_job import TrainingJob, to_batch
from firstlight.tasks.pretrain.method import Method


@dataclass(frozen=True)
class StepRate:
    """The speed of steps that follow each other without a stop."""

    images_per_s: float
    images_per_cpu_s: float
    # The share of the time that the loop waited for images.
    data_wait: float = 0.0
    # Bytes of the GPU's memory at the peak, 0 on a CPU.
    peak_bytes: int = 0


def write_noise_photographs(folder: Path, count: int, side: int) -> Path:
    """Writes `count` smooth random JPEGs of `side` x `side` into two class folders, and returns the folder."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        file = folder / f"class{number % 2}" / f"{number:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return folder


def make_timed_recipe(
    images: Path,
    storage: Path,
    *,
    size: int,
    encoder: Mapping[str, Any],
    stage: Mapping[str, Any],
    stream: Mapping[str, Any],
    augment: list[dict[str, Any]],
    dataset: Mapping[str, Any],
) -> Recipe:
    """Returns the recipe of one pretraining, with the keys `stage` of its stage, on the images in `images`."""
    source = {"name": "timed", "source": "folder", "root": str(images), "image_size": size, "test_fraction": 0.0}
    return parse_recipe(
        {
            "name": "timed",
            "storage": str(storage),
            "dataset": {
                **source,
                "train_augment": augment,
                "eval_augment": [{"op": "center_crop"}],
                **dataset,
            },
            "encoder": dict(encoder),
            "stream": dict(stream),
            "scale": {"name": "local", "workers": 0, "gpus_per_worker": 0.0, "threads": torch.get_num_threads()},
            "stages": {"pretrain": {"kind": "pretrain", **stage}},
        }
    )


class TimedTraining:
    """The training of a recipe on a device, in this process."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        store = prepare(recipe.dataset, Path(recipe.storage) / "stores", lambda: False, lambda done, total: None)
        self.context = StageContext.create(recipe, store, on_ray=False, device=device)
        self.stage: Any = recipe.stages["pretrain"]
        self.number = 0

    def build_job(self) -> TrainingJob:
        """Returns the training in a folder of its own."""
        self.number += 1
        folder = Path(self.recipe.storage) / f"job{self.number}-{time.monotonic_ns()}"
        return pretrain_job.build_job(self.context, self.stage, StageInstance("pretrain", 0, "bench", folder))

    def build_method(self, job: TrainingJob) -> Method:
        return pretrain_job.build_seeded_method(self.context, self.stage, job)

    def measure_loop(self, warmup: int) -> StepRate:
        """Trains to the end in the training loop. The first `warmup` steps do not count."""
        job = self.build_job()
        learner = self.build_method(job)
        clock = _StepClock(self.device, warmup, job.total_steps)
        failures.fault_hook = lambda rank, step: clock.look(step)
        try:
            fit(job, learner)
        finally:
            failures.fault_hook = None
        waits = [row["data_wait"] for row in read_metrics(job.folder / METRICS_FILE)[1:]]
        return clock.compute_rate(job.plan.batch_size, sum(waits) / max(len(waits), 1))

    def measure_bare_step(self, steps: int, warmup: int) -> tuple[StepRate, float]:
        """Takes steps on one batch with nothing around them: networks, loss, gradient, update.

        Returns their rate and the operations of a step on one image.
        """
        job = self.build_job()
        learner = self.build_method(job)
        learner.move_to_device(self.device)
        training = job.training
        if training.channels_last:
            learner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        arrays = next(iter(open_batches(job, TrainOrder(job.plan, 0, 1, 0, 1), job.plan.batch_size)[0]))
        batch = to_batch(arrays, self.device, job)
        spec = choose_fused(training.optimizer, self.device)
        optimizer = build_optimizer(spec, learner.parameter_groups(), training.learning_rate)
        dtype = find_autocast(training.precision, self.device)
        learner.train().begin_epoch(1)

        def take_step() -> None:
            optimizer.zero_grad(set_to_none=True)
            learner.begin_step(0)
            with torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                loss = learner(batch)["loss"]
            loss.backward()
            optimizer.step()
            learner.end_step()

        with choose_formats(learner, dtype, self.device):
            with FlopCounterMode(display=False) as counter:
                take_step()
            flops = counter.get_total_flops() / job.plan.batch_size
            if training.compile:
                learner.compile_networks()
            clock = _StepClock(self.device, warmup, warmup + steps)
            for step in range(1, warmup + steps + 1):
                take_step()
                clock.look(step)
        return clock.compute_rate(job.plan.batch_size, 0.0), flops


class _StepClock:
    """Reads the clocks after the first `warmup` steps and after the last."""

    def __init__(self, device: torch.device, warmup: int, last: int) -> None:
        self.device, self.warmup, self.last = device, warmup, last
        self.wall_s = self.cpu_s = 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def look(self, step: int) -> None:
        """Reads the clocks after a step, counted from 1, that ends the warm-up or the measurement."""
        if step not in (self.warmup, self.last):
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        wall, cpu = time.perf_counter(), time.process_time()
        self.wall_s, self.cpu_s = (wall, cpu) if step == self.warmup else (wall - self.wall_s, cpu - self.cpu_s)

    def compute_rate(self, batch_size: int, data_wait: float) -> StepRate:
        images = (self.last - self.warmup) * batch_size
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        return StepRate(images / self.wall_s, images / max(self.cpu_s, 1e-9), data_wait, peak)


def call_in_turns(arms: Mapping[str, Callable[[], StepRate]], rounds: int) -> dict[str, list[StepRate]]:
    """Calls each of `arms` once in each round, so that slow and fast minutes of a machine meet all of them."""
    found: dict[str, list[StepRate]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, measure in arms.items():
            found[name].append(measure())
    return found
