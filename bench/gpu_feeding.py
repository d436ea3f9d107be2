"""Photographs for a GPU, as far as its host prepares them: `python -m bench.gpu_feeding FOLDER...`.

Two views of each image with SimCLR's augmentation, in batches of 64: torchvision's `ImageFolder` with its transforms
for Pillow under a DataLoader, and our stream without Ray. With `augment: device` the host decodes and crops, and the
rest is left to the device, so that no GPU is needed to measure the host. Each arm has one decoding task, then as many
as there are CPUs: those of the DataLoader are processes, ours are threads. The arms take turns.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torchvision import transforms
from torchvision.datasets import ImageFolder

from bench.peers import PEER_CROP, list_simclr_ops
from bench.photographs import (
    PHOTOGRAPH_BATCH,
    PHOTOGRAPH_SCALE,
    PHOTOGRAPH_SIDES,
    PhotographArm,
    link_photographs,
    make_photograph_recipe,
    prepare_photographs,
)
from bench.spent_time import SpentTime
from bench.timed_training import StepRate
from firstlight.pipeline.data.loader import Loader
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.stream import LoadingOptions, TrainOrder, stream_batches
from firstlight.pipeline.train.device_cache import keep_crops
from firstlight.pipeline.usable_cpus import count_usable_cpus

# Chen et al. 2020, appendix A, with a smallest crop of a fifth of the area; the blur is of a tenth of the side.
SIMCLR_OPS = [PEER_CROP, *list_simclr_ops(PHOTOGRAPH_SIDES[-1])[1:]]
JITTER, BLUR_SIGMA = (0.8, 0.8, 0.8, 0.2), (0.1, 2.0)
# The system counts the CPU time of processes in these steps.
CPU_CLOCK_S = 0.01


class SimclrViews:
    """Two views of an image by torchvision's transforms, as uint8."""

    def __init__(self, side: int) -> None:
        kernel = side // 10 // 2 * 2 + 1
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(side, scale=PHOTOGRAPH_SCALE),
                transforms.RandomHorizontalFlip(),
                transforms.RandomApply([transforms.ColorJitter(*JITTER)], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.RandomApply([transforms.GaussianBlur(kernel, BLUR_SIGMA)], p=0.5),
                transforms.PILToTensor(),
            ]
        )

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.stack([self.transform(image) for _ in range(2)])


def iterate_dataloader(root: Path, side: int, tasks: int) -> Iterator[Any]:
    """Yields the batches of epochs without end of torch's DataLoader with this number of processes."""
    loader = torch.utils.data.DataLoader(
        ImageFolder(str(root), SimclrViews(side)),
        PHOTOGRAPH_BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=tasks,
        persistent_workers=True,
    )
    while True:
        yield from loader


def iterate_stream(recipe: Any, store: Store, tasks: int, crops_only: bool) -> Iterator[Any]:
    """Yields the batches of our stream with this number of threads; with `crops_only` the part of a GPU's host."""
    job = PhotographArm(recipe, store, "off").job
    loader: Loader = replace(job.loader, ops=job.loader.ops * 2)
    order = TrainOrder(job.plan, 0, 1, 0, job.total_steps)
    options: LoadingOptions = replace(job.options, tasks=tasks, prefetch=2)
    return stream_batches(keep_crops(loader) if crops_only else loader, order, PHOTOGRAPH_BATCH, options)


def measure_feeding_rate(batches: Iterator[Any], count: int) -> StepRate:
    """Takes batches, which are not trained on. The images of the start do not count."""
    for _ in itertools.islice(batches, 2):
        pass
    begun = SpentTime.read()
    taken = sum(1 for _ in itertools.islice(batches, count)) * PHOTOGRAPH_BATCH
    spent = SpentTime.read().since(begun)
    return StepRate(taken / spent.wall_s, taken / max(spent.cpu_s, CPU_CLOCK_S))


def compare_feeding(
    root: Path, storage: Path, side: int, tasks: tuple[int, ...], count: int, rounds: int
) -> dict[tuple[str, int], StepRate]:
    """Returns the rates by arm and number of decoding tasks: medians of turns of `count` batches."""
    recipe = make_photograph_recipe(root, storage, side, train_augment=SIMCLR_OPS)
    store = prepare_photographs(recipe, storage / "stores")
    arms: dict[str, Callable[[int], Iterator[Any]]] = {
        "DataLoader": lambda number: iterate_dataloader(root, side, number),
        "ours, augment: cpu": lambda number: iterate_stream(recipe, store, number, crops_only=False),
        "ours, augment: device": lambda number: iterate_stream(recipe, store, number, crops_only=True),
    }
    found: dict[tuple[str, int], list[StepRate]] = {}
    for _ in range(rounds):
        for number in tasks:
            for name, start in arms.items():
                batches = start(number)
                found.setdefault((name, number), []).append(measure_feeding_rate(batches, count))
                # Its threads or processes end before the next arm begins.
                del batches
    return {
        arm: StepRate(
            float(np.median([rate.images_per_s for rate in rates])),
            float(np.median([rate.images_per_cpu_s for rate in rates])),
        )
        for arm, rates in found.items()
    }


def make_feeding_table(rates: dict[tuple[str, int], StepRate]) -> Table:
    """Shows the rates; the ratios are to the DataLoader with as many decoding tasks."""
    table = Table("decoding tasks", "arm", "images/s", "/ DataLoader", "images per CPU second", "/ DataLoader")
    for (name, tasks), rate in rates.items():
        theirs = rates["DataLoader", tasks]
        table.add_row(
            str(tasks),
            name,
            f"{rate.images_per_s:,.0f}",
            f"{rate.images_per_s / theirs.images_per_s:.2f}",
            f"{rate.images_per_cpu_s:,.0f}",
            f"{rate.images_per_cpu_s / theirs.images_per_cpu_s:.2f}",
        )
    return table


@click.command(help=__doc__)
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--side", type=int, default=224, show_default=True, help="The side of a view in pixels.")
@click.option("--batches", type=int, default=12, show_default=True, help="The batches of a turn.")
@click.option("--rounds", type=int, default=3, show_default=True, help="The turns of each arm.")
def main(folders: tuple[Path, ...], side: int, batches: int, rounds: int) -> None:
    """Measures, and prints the table."""
    torch.set_num_threads(1)
    tasks = tuple(dict.fromkeys((1, count_usable_cpus())))
    with tempfile.TemporaryDirectory() as temporary:
        root = link_photographs(folders, Path(temporary) / "images")
        rates = compare_feeding(root, Path(temporary), side, tasks, batches, rounds)
    Console(width=120).print(make_feeding_table(rates))


if __name__ == "__main__":
    main()
