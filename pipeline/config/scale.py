"""The sections `stream`, `scale` and `tracking` of a recipe: the image stream, the machines, and MLflow."""

import math
from typing import Any, Literal

from pydantic import Field, field_serializer, field_validator

from firstlight.pipeline.config.schema import check_distinct
from firstlight.pipeline.config.schemas.strict_model import StrictModel
from firstlight.pipeline.usable_cpus import count_decoders_beside

# The value of a key that the machines decide when a recipe runs.
AUTO = "auto"
# The decoding tasks of Ray for a worker on CPUs.
RAY_TASKS = 2
# The keys of a stream that decide the order of the images; the others decide nothing but speed and memory.
ORDER_KEYS = ("window", "shuffle")
# Sizes of Ray's object store in MB.
LEAST_STORE_MB, USUAL_STORE_MB = 80, 300


def _parse_count(value: Any) -> int | str:
    if value == AUTO:
        return AUTO
    if type(value) is not int or value < 1:
        raise ValueError("must be a whole number greater than or equal to 1, or auto")
    return value


class StreamOptions(StrictModel):
    """The stream of images to the training workers. A larger `window` shuffles better and needs more memory."""

    window: int = Field(
        2048,
        ge=1,
        description="The number of images that one task reads, shuffles and decodes. "
        "It is lowered if their encoded size exceeds 128 MB.",
    )
    shuffle: Literal["auto", "global", "windowed", "lanes"] = Field(
        "auto",
        description="`global`: the whole epoch is one permutation. `windowed`: row groups of the store are "
        "permuted, then the images within a window, so that a task reads whole row groups. `lanes`: the same for many "
        "workers and images: a batch is made of more windows, at least 64 images of each, so that a worker reads no "
        "more than it trains on, and no process holds the order of all images. `auto`: `global` if all encoded images "
        "fit into a task's cache (128 MB), `lanes` from 16,777,216 training images on, `windowed` between.",
    )
    resident: Literal["auto", "on", "off"] = Field(
        "auto",
        description="`on`: a training worker keeps its images decoded: on its device, where they are augmented, or, if "
        "they differ in size, in its own memory, where they are cropped. `auto`: `on` if the images fit into "
        "`resident_mb`. The pixels of every batch are the same.",
    )
    resident_mb: int = Field(
        512,
        ge=1,
        description="The memory for decoded images that each worker may use with `resident`, in MB.",
    )
    augment: Literal["auto", "cpu", "device"] = Field(
        "auto",
        description="Where streamed images are augmented. `device`: tasks only decode, and the training device "
        "augments. Images of several sizes, or that take more bytes than their views, are cropped where they are "
        "decoded. `auto`: `device` on a GPU, unless `dataset.channels` is stated. The pixels of every batch are the "
        "same.",
    )
    prefetch: int = Field(4, ge=1, description="The number of batches that are decoded ahead of the training step.")
    task_cpus: float = Field(0.25, gt=0.0, description="The number of CPUs that Ray reserves for one decoding task.")
    tasks: int | Literal["auto"] = Field(
        "auto",
        description="The number of concurrent decoding tasks of each worker: processes of Ray, or, for "
        "`scale.workers: 0`, threads. `auto`: for a worker on a GPU its share of the CPUs, as far as their memory "
        "suffices; on CPUs 2 with Ray, and without it 1 for every 4 of `scale.threads`, 16 at most.",
    )

    _check_tasks = field_validator("tasks", mode="plain")(_parse_count)

    def count_tasks(self, on_ray: bool, threads: int = 1) -> int:
        """Returns the number of decoding tasks of a worker; `auto` that no machine has replaced is that on CPUs.

        `threads`: the torch threads of this process, for a training without Ray.
        """
        if self.tasks == AUTO:
            return RAY_TASKS if on_ray else count_decoders_beside(threads)
        return int(self.tasks)


class ScaleOptions(StrictModel):
    """The machines that a recipe runs on, and how much of them it uses."""

    name: str = Field(description="A name of conf/scale starts from that file.")
    address: str = Field(
        "local",
        description="`local`: Ray is started in this process. `auto` or an address: that Ray cluster is joined.",
    )
    cpus: int | None = Field(
        None,
        ge=1,
        description="The number of logical CPUs that Ray is started with, for `address: local` only, and of processes "
        "that write a new store on a single machine. null: all CPUs of the machine.",
    )
    workers: int | tuple[int, int] | Literal["auto"] = Field(
        "auto",
        description="The number of training processes. 0: the training runs in this process, without Ray. "
        "[min, max]: the number follows the free resources between these bounds while machines join and leave. "
        "`auto`: one for each GPU; where there is none 0 on this machine, and 1 on a cluster.",
    )
    processes: int | Literal["auto"] = Field(
        "auto",
        description="The number of processes of this machine that share the seeds of a stage, and the arms and "
        "learning rates of a fine-tuning, for `workers: 0` on CPUs. Each has `threads` threads. `auto`: as many as the "
        "CPUs of `cpus` suffice for, and as fit into the free memory. Results are equal to the last bit for all "
        "numbers.",
    )
    resize_s: float = Field(
        60.0, gt=0.0, description="The seconds between two checks of the free resources, for `workers: [min, max]`."
    )
    wait_s: int = Field(
        0, ge=0, description="The seconds that an autoscaling cluster has to provide the resources for the workers."
    )
    cpus_per_worker: float = Field(0.5, gt=0.0, description="The number of CPUs that Ray reserves for one worker.")
    gpus_per_worker: float | Literal["auto"] = Field(
        "auto",
        ge=0.0,
        description="The number of GPUs that Ray reserves for one worker. `auto`: 1 where there are GPUs for all "
        "workers, 0 otherwise.",
    )
    threads: int | Literal["auto"] = Field(
        "auto",
        description="The number of torch threads of a worker. Results are equal to the last bit for equal numbers of "
        "threads only. `auto`: `cpus_per_worker`, 1 at least, for workers and on a GPU; 1 for a trial of a search; "
        "otherwise the cores of the machine divided by what a stage has to do side by side: its seeds, for a "
        "fine-tuning times its arms and learning rates.",
    )
    object_store_mb: int | Literal["auto"] = Field(
        "auto",
        description="The size of Ray's object store in MB, 80 at least, for `address: local` only. `auto`: 300, or "
        "more where the decoded images that are on their way to the workers need it.",
    )
    max_failures: int = Field(
        3, ge=0, description="How many times the workers are restarted from the last checkpoint after a failure."
    )
    collective_timeout_s: int = Field(
        600, ge=5, description="The seconds after which a worker that does not respond ends the attempt."
    )

    @field_validator("workers", mode="plain")
    @classmethod
    def _check_workers(cls, workers: Any) -> int | tuple[int, int] | str:
        if workers == AUTO:
            return AUTO
        numbers = workers if isinstance(workers, list | tuple) else [workers]
        if any(type(number) is not int for number in numbers):
            raise ValueError("must be a whole number, two of them: [min, max], or auto")
        if len(numbers) == 2 and 1 <= numbers[0] < numbers[1]:
            return numbers[0], numbers[1]
        if numbers is workers or workers < 0:
            raise ValueError("must be greater than or equal to 0, [min, max] with 1 <= min < max, or auto")
        return int(workers)

    _check_counts = field_validator("processes", "threads", mode="plain")(_parse_count)

    @field_validator("object_store_mb", mode="plain")
    @classmethod
    def _check_object_store(cls, size: Any) -> int | str:
        if size == AUTO:
            return AUTO
        if type(size) is not int or size < LEAST_STORE_MB:
            raise ValueError(f"must be a whole number greater than or equal to {LEAST_STORE_MB}, or auto")
        return size

    @field_validator("gpus_per_worker", mode="plain")
    @classmethod
    def _check_gpus(cls, gpus: Any) -> float | str:
        if gpus == AUTO:
            return AUTO
        if isinstance(gpus, bool) or not isinstance(gpus, int | float) or not math.isfinite(gpus) or gpus < 0:
            raise ValueError("must be a number greater than or equal to 0, or auto")
        return float(gpus)

    @field_serializer("workers")
    def _serialize_workers(self, workers: int | tuple[int, int] | str) -> int | list[int] | str:
        return list(workers) if isinstance(workers, tuple) else workers

    @property
    def is_resolved(self) -> bool:
        """True if neither the workers nor their GPUs are still to be chosen by the machines."""
        return AUTO not in (self.workers, self.gpus_per_worker)

    @property
    def min_workers(self) -> int:
        """The smallest number of workers that a training runs with; 1 while it is still to be chosen."""
        return self.workers[0] if isinstance(self.workers, tuple) else self.max_workers

    @property
    def max_workers(self) -> int:
        """The largest number of workers that a training runs with; 1 while it is still to be chosen."""
        if isinstance(self.workers, tuple):
            return self.workers[1]
        return 1 if self.workers == AUTO else int(self.workers)

    @property
    def worker_threads(self) -> int:
        """The torch threads of one worker; of this process 1 while they are still to be chosen."""
        if self.threads != AUTO:
            return int(self.threads)
        return max(int(self.cpus_per_worker), 1) if self.max_workers or self.worker_gpus else 1

    @property
    def object_store_bytes(self) -> int:
        """The size of Ray's object store; the usual one while it is still to be chosen."""
        return (USUAL_STORE_MB if self.object_store_mb == AUTO else int(self.object_store_mb)) * 2**20

    @property
    def worker_gpus(self) -> float:
        """The GPUs of one worker; 0 while they are still to be chosen."""
        return 0.0 if self.gpus_per_worker == AUTO else float(self.gpus_per_worker)


class TrackingOptions(StrictModel):
    """The location of the runs in MLflow, and the loggers that get the same."""

    uri: str | None = Field(
        None, description="The URI of the MLflow tracking server. null: an SQLite file in the recipe's `storage`."
    )
    experiment: str = Field("firstlight", description="The name of the MLflow experiment.")
    loggers: tuple[str, ...] = Field(
        (),
        description="[Loggers besides MLflow](mlflow.md#other-loggers), which get the same numbers: `tensorboard`, "
        "`wandb`, or those of an installed package.",
    )

    @field_validator("loggers")
    @classmethod
    def _check_loggers(cls, loggers: tuple[str, ...]) -> tuple[str, ...]:
        return check_distinct(loggers, "a logger")
