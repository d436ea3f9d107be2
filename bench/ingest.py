"""The rate at which images reach the training step, as ratios of one run: `python -m bench.ingest`.

20,000 JPEG images of 32 x 32 are written and prepared. A small convolutional network trains on them from the stream
(Ray Data), from the same stream in this process, and from images that are kept decoded. They are compared with the same
step on a batch in memory, with a plain loop of Pillow and torchvision over the same bytes, and with torch's DataLoader
over that loop with as many processes.
"""

import itertools
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torchvision.transforms import Compose, RandomHorizontalFlip, RandomResizedCrop

from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.data.loader import Loader
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.data.stream import TrainOrder
from firstlight.pipeline.run.ray_session import RaySession
from firstlight.pipeline.stages import pretrain, registry  # noqa: F401 - registers the kinds of stages
from firstlight.pipeline.stages.pretraining import job as pretrain_job
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.loop import open_batches
from firstlight.pipeline.train.training_job import TrainingJob, to_batch
from firstlight.tasks.nn.encoders import Encoder, pool_maps

INGEST_IMAGES, INGEST_IMAGE_SIZE, INGEST_BATCH = 20_000, 32, 256
# Batches before a measurement, batches of a block, and blocks of each kind
WARMUP_BATCHES, BLOCK_BATCHES, NUM_ROUNDS = 8, 20, 4
# Batches before pure reading is measured, batches measured, and all batches: at the end of the measurement, as many are
# read ahead as at its start
READ_WARMUP_BATCHES, READ_BATCHES, ALL_READ_BATCHES = 24, 96, 160
INGEST_AUGMENT = [{"op": "random_resized_crop", "scale": [0.3, 1.0]}, {"op": "horizontal_flip"}]


def write_images(folder: Path, count: int) -> Path:
    """Writes smooth random JPEGs in Parquet files of 5,000, as data hubs serve CIFAR-10, and returns the folder."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for start in range(0, count, 5_000):
        rows = []
        for _ in range(min(5_000, count - start)):
            file = BytesIO()
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((INGEST_IMAGE_SIZE, INGEST_IMAGE_SIZE), Image.Resampling.BICUBIC).save(
                file, "JPEG", quality=90
            )
            rows.append(file.getvalue())
        table = pa.table({"image": pa.array(rows, pa.binary()), "label": pa.array(np.zeros(len(rows), np.int64))})
        pq.write_table(table, folder / f"train-{start:06d}.parquet")
    return folder


def make_ingest_recipe(root: Path, storage: Path, workers: int, resident: str) -> Any:
    """Returns the recipe of a pretraining on the images in `root`."""
    stage = {
        "kind": "pretrain",
        "method": {"name": "nat", "dim": 16, "hidden": [], "pool": "avg"},
        "epochs": 50,
        "batch_size": INGEST_BATCH,
    }
    return parse_recipe(
        {
            "name": "ingest",
            "storage": str(storage),
            "dataset": {
                "name": "ingest",
                "source": "parquet",
                "root": str(root),
                "label_column": None,
                "test_fraction": 0.0,
                "train_augment": INGEST_AUGMENT,
                "eval_augment": [{"op": "center_crop"}],
            },
            "encoder": {"name": "convnet", "width": 16, "depth": 4},
            "stream": {"resident": resident},
            "scale": {"name": "local", "workers": workers},
            "stages": {"pretrain": {**stage, "optimizer": {"name": "SGD", "lr": 0.1}}},
        }
    )


class IngestTraining:
    """A network and its step, and the batches of a recipe."""

    def __init__(self, root: Path, storage: Path, on_ray: bool, resident: str) -> None:
        chosen = make_ingest_recipe(root, storage, int(on_ray), resident)
        store = prepare(chosen.dataset, storage / "stores", lambda: on_ray, lambda done, total: None)
        context = StageContext.create(chosen, store, on_ray, torch.device("cpu"))
        stage = chosen.stages["pretrain"]
        self.job: TrainingJob = pretrain_job.build_job(
            context, stage, StageInstance("pretrain", 0, "bench", storage / "job")
        )
        self.net = Encoder(chosen.network_spec, INGEST_IMAGE_SIZE).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01)

    def read_batches(self, count: int) -> Iterator[dict[str, Any]]:
        """Yields the first `count` batches and no more, as others would be decoded during the next measurement."""
        order = TrainOrder(self.job.plan, 0, 1, 0, count)
        return open_batches(self.job, order, INGEST_BATCH)[0]

    def train_step(self, images: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        pool_maps(self.net(images), "avg").square().mean().backward()
        self.optimizer.step()


def measure_feeding(training: IngestTraining) -> tuple[float, float]:
    """Returns the throughput fed / bare, in alternating blocks, and the longest wait at an epoch's boundary.

    The wait is given as a multiple of the mean bare step.
    """
    stream, steps = training.read_batches(WARMUP_BATCHES + 1 + NUM_ROUNDS * BLOCK_BATCHES), training.job.plan.steps
    fixed_images = to_batch(next(stream), training.job.device, training.job).views[0]
    for arrays in itertools.islice(stream, WARMUP_BATCHES):
        training.train_step(to_batch(arrays, training.job.device, training.job).views[0])
    fed, bare, gaps, done = 0.0, 0.0, [0.0], WARMUP_BATCHES + 1
    for _ in range(NUM_ROUNDS):
        start = time.perf_counter()
        for _ in range(BLOCK_BATCHES):
            waiting = time.perf_counter()
            arrays = next(stream)
            gaps += [time.perf_counter() - waiting] if done % steps == 0 else []
            training.train_step(to_batch(arrays, training.job.device, training.job).views[0])
            done += 1
        fed += time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(BLOCK_BATCHES):
            training.train_step(fixed_images)
        bare += time.perf_counter() - start
    return bare / fed, max(gaps) / (bare / NUM_ROUNDS / BLOCK_BATCHES)


def read_cpu_seconds() -> dict[int, float]:
    """Returns the CPU seconds of this process and of all its descendants, by process id."""
    seconds = {}
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds[process.pid] = times.user + times.system
    return seconds


def measure_images_per_s(stream: Iterator[Any]) -> tuple[float, float]:
    """Returns the images per second and per CPU second over `READ_BATCHES` batches.

    The processes that make them have started and read ahead before.
    """
    for _ in itertools.islice(stream, READ_WARMUP_BATCHES):
        pass
    start, before = time.perf_counter(), read_cpu_seconds()
    for _ in itertools.islice(stream, READ_BATCHES):
        pass
    wall, after = time.perf_counter() - start, read_cpu_seconds()
    if isinstance(stream, Generator):
        stream.close()
    return READ_BATCHES * INGEST_BATCH / wall, READ_BATCHES * INGEST_BATCH / sum(
        seconds - before.get(pid, 0.0) for pid, seconds in after.items()
    )


class PillowDataset(torch.utils.data.Dataset):
    """The usual code without Firstlight.

    Encoded images are in memory, decoded by Pillow and augmented by torchvision's transforms.
    """

    def __init__(self, encoded: list[bytes]) -> None:
        self.encoded = encoded
        self.transform = Compose([RandomResizedCrop(INGEST_IMAGE_SIZE, scale=(0.3, 1.0)), RandomHorizontalFlip()])

    def __len__(self) -> int:
        return ALL_READ_BATCHES * INGEST_BATCH

    def __getitem__(self, k: int) -> np.ndarray:
        image = Image.open(BytesIO(self.encoded[k % len(self.encoded)])).convert("RGB")
        return np.array(self.transform(image))


def iterate_pillow_batches(images: PillowDataset) -> Iterator[Any]:
    """Yields the batches of a plain loop in this process."""
    for start in range(0, len(images), INGEST_BATCH):
        yield torch.from_numpy(np.stack([images[k] for k in range(start, start + INGEST_BATCH)]))


def iterate_loader_batches(loader: Loader, ids: np.ndarray) -> Iterator[Any]:
    """Yields batches of the work of the stream, without the stream."""
    for rows in np.resize(ids, (ALL_READ_BATCHES, INGEST_BATCH)):
        yield loader.load(rows, np.zeros_like(rows), loader.read_encoded(rows))


def measure_peak_mb(stream: Iterator[Any]) -> float:
    """Returns the largest unshared memory of this process and its descendants while `stream` is read, in MB."""
    peak = 0
    for _ in stream:
        alive = [psutil.Process(), *psutil.Process().children(recursive=True)]
        peak = max(peak, sum(p.memory_full_info().uss for p in alive if p.is_running()))
    return peak / 1e6


def measure_ingest(root: Path, storage: Path) -> Iterator[tuple[str, str]]:
    """Yields the name and the ratio of each measurement."""
    for name, on_ray, resident in (
        ("stream, Ray Data", True, "off"),
        ("stream, this process", False, "off"),
        ("held decoded", False, "on"),
    ):
        fed, gap = measure_feeding(IngestTraining(root, storage, on_ray, resident))
        yield f"{name}: training fed / the same step on a batch in memory", f"{fed:.3f}"
        yield f"{name}: longest wait at an epoch's boundary / step", f"{gap:.2f}"
    yield from measure_reading(IngestTraining(root, storage, on_ray=True, resident="off"))


def measure_reading(training: IngestTraining) -> Iterator[tuple[str, str]]:
    """Yields ratios of pure reading, compared with one process, and with as many processes as the stream has."""
    loader, ids, tasks = training.job.loader, training.job.plan.ids, training.job.options.tasks
    dataset = PillowDataset(loader.store.read(ids)[0])
    found: dict[str, list[tuple[float, float]]] = {"stream": [], "plain": [], "ours": [], "torch": []}
    # The kinds take turns, as other processes may load the machine
    for _ in range(2):
        found["stream"].append(measure_images_per_s(training.read_batches(ALL_READ_BATCHES)))
        found["plain"].append(measure_images_per_s(iterate_pillow_batches(dataset)))
        found["ours"].append(measure_images_per_s(iterate_loader_batches(loader, ids)))
        found["torch"].append(
            measure_images_per_s(iter(torch.utils.data.DataLoader(dataset, INGEST_BATCH, num_workers=tasks)))
        )
    (speed, per_cpu), (_, plain_cpu), (_, ours_cpu), (torchs, torchs_cpu) = (np.mean(found[name], 0) for name in found)
    yield (
        "stream, Ray Data: images per CPU second / a plain loop's (Pillow and torchvision, one process)",
        f"{per_cpu / plain_cpu:.3f}",
    )
    yield (
        "stream, Ray Data: images per CPU second / the same work in one process, without Ray",
        f"{per_cpu / ours_cpu:.3f}",
    )
    yield (
        f"stream, Ray Data: images per second / torch's DataLoader over the plain loop's images, {tasks} processes",
        f"{speed / torchs:.3f}",
    )
    yield "stream, Ray Data: images per CPU second / the same DataLoader's", f"{per_cpu / torchs_cpu:.3f}"
    for what, column in (("second", 0), ("CPU second", 1)):
        rates = ", ".join(
            f"{name} " + " and ".join(f"{rate[column]:,.0f}" for rate in both) for name, both in found.items()
        )
        yield f"(images per {what}, both turns)", rates


def main() -> None:
    """Runs all measurements and prints a table."""
    torch.set_num_threads(1)
    table = Table(
        "measured",
        "ratio",
        title=f"images into training: {INGEST_IMAGES:,} of {INGEST_IMAGE_SIZE} x {INGEST_IMAGE_SIZE}, "
        f"batches of {INGEST_BATCH}",
        title_justify="left",
    )
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder)
        root = write_images(storage / "images", INGEST_IMAGES)
        with RaySession(make_ingest_recipe(root, storage, 1, "off").scale) as session:
            session.start()
            for name, ratio in measure_ingest(root, storage):
                table.add_row(name, ratio)
            small = IngestTraining(
                write_images(storage / "few", INGEST_IMAGES // 10), storage / "small", on_ray=True, resident="off"
            )
            large = IngestTraining(root, storage, on_ray=True, resident="off")
            low, high = (measure_peak_mb(training.read_batches(READ_BATCHES)) for training in (small, large))
            table.add_row("stream, Ray Data: peak memory for 10 x the images / for 1 x", f"{high / low:.3f}")
            Console(width=120).print(table)


if __name__ == "__main__":
    main()
