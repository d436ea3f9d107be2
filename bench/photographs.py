"""Photographs into batches, against torchvision and torch's DataLoader: `python -m bench.photographs FOLDER...`.

The folders hold JPEG photographs of any sizes, in any folders below them. Each arm reads all of them, in batches of 64,
with a random resized crop of 0.2 to 1 of the area and a flip: torchvision's `ImageFolder` with its transforms for
Pillow under a DataLoader, our stream below Ray, and our images that are held decoded. The arms take turns, all of them
in this process, and are compared in images per CPU second.
"""

import argparse
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, PILToTensor, RandomHorizontalFlip, RandomResizedCrop

from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.data.augment.compiled.loading import compiled_ops
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.stream import TrainOrder
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.bounded_store import find_recipe_side
from firstlight.pipeline.stages import pretrain, registry  # noqa: F401 - registers the kinds of stages
from firstlight.pipeline.stages.pretraining import job as pretrain_job
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.loop import open_batches
from firstlight.pipeline.train.training_job import TrainingJob

PHOTOGRAPH_SIDES, PHOTOGRAPH_BATCH, PHOTOGRAPH_SCALE = (64, 128, 224), 64, (0.2, 1.0)
# Each arm reads all photographs this many times, in turns
PHOTOGRAPH_ROUNDS = 7
PHOTOGRAPH_ENDINGS = {".jpg", ".jpeg"}


def link_photographs(folders: Iterable[Path], root: Path) -> Path:
    """Links all JPEG files below `folders` into one class folder below `root`, and returns `root`."""
    photographs = root / "photographs"
    photographs.mkdir(parents=True)
    found = sorted(
        file for folder in folders for file in folder.rglob("*") if file.suffix.lower() in PHOTOGRAPH_ENDINGS
    )
    for number, file in enumerate(found):
        (photographs / f"{number:06d}.jpg").hardlink_to(file) if _has_same_device(file, root) else (
            photographs / f"{number:06d}.jpg"
        ).write_bytes(file.read_bytes())
    return root


def _has_same_device(file: Path, folder: Path) -> bool:
    return file.stat().st_dev == folder.stat().st_dev


def make_photograph_recipe(root: Path, storage: Path, side: int, **dataset: Any) -> Any:
    """Returns the recipe of a pretraining on the photographs in `root`, in views of `side` pixels."""
    method = {"name": "nat", "dim": 16, "hidden": [], "pool": "avg"}
    stage = {"kind": "pretrain", "method": method, "epochs": 1000, "batch_size": PHOTOGRAPH_BATCH}
    return parse_recipe(
        {
            "name": "photographs",
            "storage": str(storage),
            "dataset": {
                "name": "photographs",
                "source": "folder",
                "root": str(root),
                "image_size": side,
                "test_fraction": 0.0,
                "train_augment": [
                    {"op": "random_resized_crop", "scale": list(PHOTOGRAPH_SCALE)},
                    {"op": "horizontal_flip"},
                ],
                "eval_augment": [{"op": "center_crop"}],
                **dataset,
            },
            "encoder": {"name": "convnet", "width": 16, "depth": 4},
            "scale": {"name": "local", "workers": 0},
            "stages": {"pretrain": {**stage, "optimizer": {"name": "SGD", "lr": 0.1}}},
        }
    )


def prepare_photographs(recipe: Any, stores: Path) -> Store:
    """Returns the store of a recipe's photographs, written by this process."""
    side = find_recipe_side(recipe)
    return prepare(recipe.dataset, stores, lambda: False, lambda done, total: None, auto_side=side)


class PhotographArm:
    """Photographs in batches from one of our two sources; each call goes on where the last one ended.

    The compiled augmentations are loaded, as after the first seconds of a training.
    """

    def __init__(self, recipe: Any, store: Store, resident: str) -> None:
        compiled_ops.load()
        stream = recipe.stream.model_copy(update={"resident": resident, "resident_mb": 1 << 20})
        context = StageContext.create(recipe.model_copy(update={"stream": stream}), store, on_ray=False)
        instance = StageInstance("pretrain", 0, "bench", Path(recipe.storage) / "job")
        self.job: TrainingJob = pretrain_job.build_job(context, recipe.stages["pretrain"], instance)
        self.epoch = 0

    def read_photographs(self) -> Iterator[Any]:
        """Yields the batches of one epoch."""
        steps = self.job.plan.steps
        order = TrainOrder(self.job.plan, 0, 1, self.epoch * steps, (self.epoch + 1) * steps)
        self.epoch += 1
        return open_batches(self.job, order, PHOTOGRAPH_BATCH)[0]


class TorchvisionArm:
    """Photographs in batches as one writes it with torch and torchvision, without further processes."""

    def __init__(self, root: Path, side: int) -> None:
        transform = Compose([RandomResizedCrop(side, scale=PHOTOGRAPH_SCALE), RandomHorizontalFlip(), PILToTensor()])
        self.loader = torch.utils.data.DataLoader(
            ImageFolder(str(root), transform), PHOTOGRAPH_BATCH, shuffle=True, drop_last=True
        )

    def read_photographs(self) -> Iterator[Any]:
        """Yields the batches of one epoch."""
        return iter(self.loader)


def measure_images_per_cpu_s(arm: PhotographArm | TorchvisionArm) -> float:
    """Returns the images per CPU second of this process, over one epoch."""
    before, batches = time.process_time(), sum(1 for _ in arm.read_photographs())
    return batches * PHOTOGRAPH_BATCH / (time.process_time() - before)


def compare_photograph_arms(root: Path, storage: Path, side: int, **dataset: Any) -> dict[str, float]:
    """Returns the images per CPU second of each arm: the medians of turns. Held images have been decoded before."""
    recipe = make_photograph_recipe(root, storage, side, **dataset)
    store = prepare_photographs(recipe, storage / "stores")
    arms: dict[str, PhotographArm | TorchvisionArm] = {
        "torchvision": TorchvisionArm(root, side),
        "streamed": PhotographArm(recipe, store, "off"),
    }
    try:
        arms["held"] = PhotographArm(recipe, store, "on")
    except UserError as error:
        print(error)
    for arm in arms.values():
        next(iter(arm.read_photographs()))
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(PHOTOGRAPH_ROUNDS):
        for name, arm in arms.items():
            rates[name].append(measure_images_per_cpu_s(arm))
    return {name: float(np.median(found)) for name, found in rates.items()}


def measure_preparing(root: Path, storage: Path, side: int, **dataset: Any) -> tuple[float, float]:
    """Returns the CPU seconds of `prepare` in this process, and those of decoding the same files by Pillow."""
    recipe = make_photograph_recipe(root, storage, side, **dataset)
    start = time.process_time()
    prepare_photographs(recipe, storage / f"prepared-{side}")
    prepared = time.process_time()
    for file in sorted(root.rglob("*.jpg")):
        with Image.open(file) as image:
            image.convert("RGB")
    return prepared - start, time.process_time() - prepared


def main() -> None:
    """Runs all measurements and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folders with JPEG photographs")
    parser.add_argument("--side", type=int, action="append", help="the side of a view (default: 64, 128 and 224)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        storage = Path(temporary)
        root = link_photographs(options.folders, storage / "images")
        files = list(root.rglob("*.jpg"))
        kilobytes = sum(file.stat().st_size for file in files) / len(files) / 1000
        table = Table(
            "side",
            "arm",
            "images per CPU second",
            "/ torchvision",
            title=f"{len(files):,} JPEGs of {kilobytes:,.0f} kB",
        )
        for side in options.side or PHOTOGRAPH_SIDES:
            rates = compare_photograph_arms(root, storage, side)
            for name, rate in rates.items():
                table.add_row(str(side), name, f"{rate:,.0f}", f"{rate / rates['torchvision']:.2f}")
            prepared, decoded = measure_preparing(root, storage, side)
            table.add_row(str(side), "prepare: CPU seconds / decoding", f"{prepared:.1f}", f"{prepared / decoded:.2f}")
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
