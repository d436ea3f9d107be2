"""How well images reach the training step, as ratios of one run: `python -m bench.ingest`.

20,000 JPEG images of 32 x 32 are written and prepared; a small convolutional network trains on them from the stream (Ray Data), from the same
stream in this process, and from images that are held decoded. Beside it: the same step on a batch already in memory, a plain loop that decodes
and augments, and torch's DataLoader with as many processes.
"""

import itertools
import tempfile
import time
from collections.abc import Iterator
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

from pipeline import pretrain
from pipeline.config import parse
from pipeline.fit import Job, _stream, to_batch
from pipeline.prepare import prepare
from pipeline.session import Session
from pipeline.stage import Instance
from pipeline.stream import Loader, TrainOrder
from pipeline.worker import Worker
from tasks.encoders import Encoder, pooled

IMAGES, SIDE, BATCH = 20_000, 32, 256
WARM, BLOCK, ROUNDS, READ = 8, 20, 4, 60  # batches: before a measurement, of one, blocks of each kind, and of a pure reading
CROPS = [{"op": "random_resized_crop", "scale": [0.3, 1.0]}, {"op": "horizontal_flip"}]


def write_images(folder: Path, count: int) -> Path:
    """Smooth random JPEGs in Parquet files of 5,000, as data hubs serve CIFAR-10."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for start in range(0, count, 5_000):
        rows = []
        for _ in range(min(5_000, count - start)):
            file = BytesIO()
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            rows.append(file.getvalue())
        table = pa.table({"image": pa.array(rows, pa.binary()), "label": pa.array(np.zeros(len(rows), np.int64))})
        pq.write_table(table, folder / f"train-{start:06d}.parquet")
    return folder


def recipe(root: Path, storage: Path, workers: int, resident: str) -> Any:
    stage = {"kind": "pretrain", "method": {"name": "nat", "dim": 16, "hidden": [], "pool": "avg"}, "epochs": 50, "batch_size": BATCH}
    return parse(
        {
            "name": "ingest",
            "storage": str(storage),
            "dataset": {
                "name": "ingest",
                "source": "parquet",
                "root": str(root),
                "label_column": None,
                "test_fraction": 0.0,
                "train_augment": CROPS,
                "eval_augment": [{"op": "center_crop"}],
            },
            "encoder": {"name": "convnet", "width": 16, "depth": 4},
            "stream": {"resident": resident},
            "scale": {"name": "local", "workers": workers},
            "stages": {"pretrain": {**stage, "optimizer": {"name": "SGD", "lr": 0.1}}},
        }
    )


class Training:
    """A network and its step, and the batches of a recipe."""

    def __init__(self, root: Path, storage: Path, on_ray: bool, resident: str) -> None:
        chosen = recipe(root, storage, int(on_ray), resident)
        store = prepare(chosen.dataset, storage / "stores", lambda: on_ray, lambda done, total: None)
        worker = Worker.start(chosen, store, on_ray, torch.device("cpu"))
        stage = chosen.stages["pretrain"]
        self.job: Job = pretrain.job(worker, stage, Instance("pretrain", 0, "bench", storage / "job"))
        self.net = Encoder(chosen.encoder.model_dump(), SIDE).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01)

    def batches(self, count: int) -> Iterator[dict[str, Any]]:
        """The first `count`, and no more: what is not asked for would be decoded beside the next measurement."""
        order = TrainOrder(self.job.plan, 0, 1, 0, count)
        return _stream(self.job, order, BATCH)[0]

    def step(self, images: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        pooled(self.net(images), "avg").square().mean().backward()
        self.optimizer.step()


def fed_against_bare(training: Training) -> tuple[float, float]:
    """Throughput fed / bare, in alternating blocks; the longest wait for a batch at an epoch's boundary / mean bare step."""
    stream, steps = training.batches(WARM + 1 + ROUNDS * BLOCK), training.job.plan.steps
    kept = to_batch(next(stream), training.job.device, training.job).views[0]
    for arrays in itertools.islice(stream, WARM):
        training.step(to_batch(arrays, training.job.device, training.job).views[0])
    fed, bare, gaps, done = 0.0, 0.0, [0.0], WARM + 1
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(BLOCK):
            waiting = time.perf_counter()
            arrays = next(stream)
            gaps += [time.perf_counter() - waiting] if done % steps == 0 else []
            training.step(to_batch(arrays, training.job.device, training.job).views[0])
            done += 1
        fed += time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(BLOCK):
            training.step(kept)
        bare += time.perf_counter() - start
    return bare / fed, max(gaps) / (bare / ROUNDS / BLOCK)


def cpu_seconds() -> float:
    """Of this process and of all below it."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def images_per_s(stream: Iterator[Any]) -> tuple[float, float]:
    """(per second, per CPU second) of READ batches, after the first few."""
    for _ in itertools.islice(stream, WARM):
        pass
    start, cpu = time.perf_counter(), cpu_seconds()
    for _ in itertools.islice(stream, READ):
        pass
    return READ * BATCH / (time.perf_counter() - start), READ * BATCH / (cpu_seconds() - cpu)


def plain_loop(loader: Loader, ids: np.ndarray) -> Iterator[Any]:
    for start in range(0, len(ids), BATCH):
        part = ids[start : start + BATCH]
        yield loader.load(part, np.zeros_like(part), loader.read(part))


class _Images(torch.utils.data.Dataset):
    """The same work as the stream's, an image at a time, for torch's DataLoader."""

    def __init__(self, loader: Loader, ids: np.ndarray) -> None:
        self.loader, self.ids = loader, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, k: int) -> np.ndarray:
        ids = self.ids[k : k + 1]
        views: np.ndarray = self.loader.load(ids, np.zeros_like(ids), self.loader.read(ids))["views"]
        return np.asarray(views[0])


def data_loader(loader: Loader, ids: np.ndarray, processes: int) -> Iterator[Any]:
    return iter(torch.utils.data.DataLoader(_Images(loader, ids), BATCH, num_workers=processes))


def peak_mb(stream: Iterator[Any]) -> float:
    """The most memory that this process and those below it have to themselves while `stream` is read."""
    peak = 0
    for _ in stream:
        alive = [psutil.Process(), *psutil.Process().children(recursive=True)]
        peak = max(peak, sum(p.memory_full_info().uss for p in alive if p.is_running()))
    return peak / 1e6


def rows(root: Path, storage: Path) -> Iterator[tuple[str, str]]:
    """What was measured, and the ratio."""
    for name, on_ray, resident in (("stream, Ray Data", True, "off"), ("stream, this process", False, "off"), ("held decoded", False, "on")):
        fed, gap = fed_against_bare(Training(root, storage, on_ray, resident))
        yield f"{name}: training fed / the same step on a batch in memory", f"{fed:.3f}"
        yield f"{name}: longest wait at an epoch's boundary / step", f"{gap:.2f}"
    streamed = Training(root, storage, on_ray=True, resident="off")
    loader, ids = streamed.job.loader, streamed.job.plan.ids
    speed, per_cpu = images_per_s(streamed.batches(WARM + READ))
    plain, plain_per_cpu = images_per_s(plain_loop(loader, np.tile(ids, 2)))
    tasks = streamed.job.options.tasks
    torchs, torchs_per_cpu = images_per_s(data_loader(loader, np.tile(ids, 2), tasks))
    yield "stream, Ray Data: images per CPU second / a plain loop's", f"{per_cpu / plain_per_cpu:.3f}"
    yield f"stream, Ray Data: images per second / torch's DataLoader with {tasks} processes", f"{speed / torchs:.3f}"
    yield "stream, Ray Data: images per CPU second / torch's DataLoader", f"{per_cpu / torchs_per_cpu:.3f}"
    yield "(images per second: stream, plain loop, DataLoader)", f"{speed:,.0f}, {plain:,.0f}, {torchs:,.0f}"


def main() -> None:
    torch.set_num_threads(1)
    table = Table("measured", "ratio", title=f"images into training: {IMAGES:,} of {SIDE} x {SIDE}, batches of {BATCH}", title_justify="left")
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder)
        root = write_images(storage / "images", IMAGES)
        with Session(recipe(root, storage, 1, "off").scale) as session:
            session.start()
            for name, ratio in rows(root, storage):
                table.add_row(name, ratio)
            small = Training(write_images(storage / "few", IMAGES // 10), storage / "small", on_ray=True, resident="off")
            large = Training(root, storage, on_ray=True, resident="off")
            low, high = (peak_mb(training.batches(READ)) for training in (small, large))
            table.add_row("stream, Ray Data: peak memory for 10 x the images / for 1 x", f"{high / low:.3f}")
            Console(width=120).print(table)


if __name__ == "__main__":
    main()
