"""How well images reach the training step, as ratios of one run: `python -m bench.ingest`.

20,000 JPEG images of 32 x 32 are written and prepared; a small convolutional network trains on them from the stream (Ray Data), from the same
stream in this process, and from images that are held decoded. Beside it: the same step on a batch already in memory, a plain loop of
Pillow and torchvision over the same bytes, and torch's DataLoader over that, with as many processes.
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

from firstlight.pipeline.config.recipe import parse
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.data.stream import Loader, TrainOrder
from firstlight.pipeline.run.ray_session import Session
from firstlight.pipeline.stages import pretrain
from firstlight.pipeline.stages.stage import Instance
from firstlight.pipeline.train.context import Worker
from firstlight.pipeline.train.job import Job, to_batch
from firstlight.pipeline.train.loop import _stream
from firstlight.tasks.nn.encoders import Encoder, pooled

IMAGES, SIDE, BATCH = 20_000, 32, 256
WARM, BLOCK, ROUNDS = 8, 20, 4  # batches before a measurement, in a block, and blocks of each kind
STARTED, READ, READ_ALL = (
    24,
    96,
    160,
)  # batches before a pure reading is measured, in it, and in all: it ends with as many read ahead as it began
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
    stage = {
        "kind": "pretrain",
        "method": {"name": "nat", "dim": 16, "hidden": [], "pool": "avg"},
        "epochs": 50,
        "batch_size": BATCH,
    }
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


def cpu_seconds() -> dict[int, float]:
    """Of this process and of all below it, by process."""
    seconds = {}
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds[process.pid] = times.user + times.system
    return seconds


def images_per_s(stream: Iterator[Any]) -> tuple[float, float]:
    """(per second, per CPU second) of READ batches, once the processes that make them have started and are ahead."""
    for _ in itertools.islice(stream, STARTED):
        pass
    start, before = time.perf_counter(), cpu_seconds()
    for _ in itertools.islice(stream, READ):
        pass
    wall, after = time.perf_counter() - start, cpu_seconds()
    if isinstance(stream, Generator):
        stream.close()
    return READ * BATCH / wall, READ * BATCH / sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())


class Plain(torch.utils.data.Dataset):
    """What one writes without Firstlight: encoded images in memory, decoded by Pillow, augmented by torchvision's transforms."""

    def __init__(self, encoded: list[bytes]) -> None:
        self.encoded = encoded
        self.transform = Compose([RandomResizedCrop(SIDE, scale=(0.3, 1.0)), RandomHorizontalFlip()])

    def __len__(self) -> int:
        return READ_ALL * BATCH

    def __getitem__(self, k: int) -> np.ndarray:
        image = Image.open(BytesIO(self.encoded[k % len(self.encoded)])).convert("RGB")
        return np.array(self.transform(image))


def plain_loop(images: Plain) -> Iterator[Any]:
    for start in range(0, len(images), BATCH):
        yield torch.from_numpy(np.stack([images[k] for k in range(start, start + BATCH)]))


def our_loop(loader: Loader, ids: np.ndarray) -> Iterator[Any]:
    """The stream's work without the stream."""
    for rows in np.resize(ids, (READ_ALL, BATCH)):
        yield loader.load(rows, np.zeros_like(rows), loader.read(rows))


def peak_mb(stream: Iterator[Any]) -> float:
    """The most memory that this process and those below it have to themselves while `stream` is read."""
    peak = 0
    for _ in stream:
        alive = [psutil.Process(), *psutil.Process().children(recursive=True)]
        peak = max(peak, sum(p.memory_full_info().uss for p in alive if p.is_running()))
    return peak / 1e6


def rows(root: Path, storage: Path) -> Iterator[tuple[str, str]]:
    """What was measured, and the ratio."""
    for name, on_ray, resident in (
        ("stream, Ray Data", True, "off"),
        ("stream, this process", False, "off"),
        ("held decoded", False, "on"),
    ):
        fed, gap = fed_against_bare(Training(root, storage, on_ray, resident))
        yield f"{name}: training fed / the same step on a batch in memory", f"{fed:.3f}"
        yield f"{name}: longest wait at an epoch's boundary / step", f"{gap:.2f}"
    yield from reading(Training(root, storage, on_ray=True, resident="off"))


def reading(training: Training) -> Iterator[tuple[str, str]]:
    """Nothing but reading: against one process, and against as many as the stream has."""
    loader, ids, tasks = training.job.loader, training.job.plan.ids, training.job.options.tasks
    plain = Plain(loader.store.read(ids)[0])
    found: dict[str, list[tuple[float, float]]] = {"stream": [], "plain": [], "ours": [], "torch": []}
    for _ in range(2):  # in turns: the machine may be at other things
        found["stream"].append(images_per_s(training.batches(READ_ALL)))
        found["plain"].append(images_per_s(plain_loop(plain)))
        found["ours"].append(images_per_s(our_loop(loader, ids)))
        found["torch"].append(images_per_s(iter(torch.utils.data.DataLoader(plain, BATCH, num_workers=tasks))))
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
    torch.set_num_threads(1)
    table = Table(
        "measured",
        "ratio",
        title=f"images into training: {IMAGES:,} of {SIDE} x {SIDE}, batches of {BATCH}",
        title_justify="left",
    )
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder)
        root = write_images(storage / "images", IMAGES)
        with Session(recipe(root, storage, 1, "off").scale) as session:
            session.start()
            for name, ratio in rows(root, storage):
                table.add_row(name, ratio)
            small = Training(
                write_images(storage / "few", IMAGES // 10), storage / "small", on_ray=True, resident="off"
            )
            large = Training(root, storage, on_ray=True, resident="off")
            low, high = (peak_mb(training.batches(READ)) for training in (small, large))
            table.add_row("stream, Ray Data: peak memory for 10 x the images / for 1 x", f"{high / low:.3f}")
            Console(width=120).print(table)


if __name__ == "__main__":
    main()
