"""Augmentations by Pillow, by machine code and by torch, on one thread: `python -m bench.augmentations`.

All three make the same views, bit by bit: Pillow for a process that makes few, machine code for one that makes many,
torch for images that are augmented on a GPU (here it computes on the CPU). They take turns on the same images, and the
table has the least CPU microseconds of a view.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import torch
from PIL import Image, ImageFilter
from rich.console import Console
from rich.table import Table

from bench.peers import PEER_CROP, list_simclr_ops
from firstlight.pipeline.data.augment.compiled.loading import CompiledOps
from firstlight.pipeline.data.augment.compiled.steps import pack_steps
from firstlight.pipeline.data.augment.op_params import OpBatch
from firstlight.pipeline.data.augment.ops import apply_params, sample_params
from firstlight.pipeline.data.augment.random_numbers import derive_view_keys
from firstlight.pipeline.train.device_ops.augment_batch import augment_batch

Ops = Sequence[Mapping[str, Any]]
FLIP: dict[str, Any] = {"op": "horizontal_flip"}
# Augmentations by name, as functions of the side of a view.
AUGMENTATIONS: dict[str, Callable[[int], Ops]] = {
    "crop and flip": lambda side: [PEER_CROP, FLIP],
    "SimCLR": list_simclr_ops,
    "FixMatch, strong": lambda side: [
        {"op": "random_shift"},
        FLIP,
        {"op": "rand_augment", "pool": "fixmatch", "magnitudes": "random"},
        {"op": "cutout"},
    ],
}
# The images of a case; more are copies of these.
DISTINCT_IMAGES = 16


@dataclass(frozen=True)
class AugmentationCase:
    """Views of `side` pixels, of `count` images of `width` x `height`."""

    width: int
    height: int
    side: int
    count: int

    @property
    def label(self) -> str:
        return f"{self.side} px of {self.width} x {self.height}"


AUGMENTATION_CASES = (
    AugmentationCase(32, 32, 32, 256),
    AugmentationCase(170, 128, 64, 256),
    AugmentationCase(340, 256, 224, 64),
)


def make_smooth_images(case: AugmentationCase) -> np.ndarray:
    """Returns (n, H, W, 3) uint8 images of clouds, whose neighbouring pixels are alike, as those of photographs are."""
    rng, images = np.random.default_rng(0), []
    for _ in range(min(DISTINCT_IMAGES, case.count)):
        noise = Image.fromarray(rng.integers(0, 256, (case.height, case.width, 3), dtype=np.uint8))
        clouds = np.asarray(noise.filter(ImageFilter.GaussianBlur(4)), np.int16)
        images.append(((clouds - 128) * 6 + 128).clip(0, 255).astype(np.uint8))
    return np.stack([images[k % len(images)] for k in range(case.count)])


def measure_augmentations(case: AugmentationCase, ops: Ops, turns: int) -> dict[str, float]:
    """Returns the least CPU microseconds of a view of each of the three.

    Raises:
        ValueError: they do not make the same views.
    """
    images, ids = make_smooth_images(case), np.arange(case.count)
    keys, sizes = derive_view_keys(0, ids, ids, 0), np.tile((case.width, case.height), (case.count, 1))
    drawn = sample_params(ops, keys, sizes, case.side)
    compiled = CompiledOps()
    compiled.load()
    # A pixel of four bytes, as Pillow and the decoder have it.
    pixels = np.concatenate((images, images[..., :1]), 3)
    on_device = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def run_compiled() -> np.ndarray:
        views = np.empty((case.count, case.side, case.side, 3), np.uint8)
        make_views = compiled.find()
        if make_views is None:
            raise ValueError(compiled.obstacle)
        steps = pack_steps(drawn)
        for k in range(case.count):
            make_views(pixels[k : k + 1], steps.numbers[k : k + 1], steps.weights[k : k + 1], views[k : k + 1])
        return views

    opened = [Image.fromarray(image) for image in images]
    arms: dict[str, Callable[[], np.ndarray]] = {
        "Pillow": lambda: _make_pillow_views(opened, drawn, case.side),
        "machine code": run_compiled,
        "torch": lambda: augment_batch(on_device, drawn, case.side).permute(0, 2, 3, 1).numpy(),
    }
    expected = arms["Pillow"]()
    for name, run in arms.items():
        if not np.array_equal(run(), expected):
            raise ValueError(f"{name} makes other views than Pillow")
    spent: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(turns):
        for name, run in arms.items():
            before = time.process_time()
            run()
            spent[name].append(time.process_time() - before)
    return {name: min(seconds) / case.count * 1e6 for name, seconds in spent.items()}


def _make_pillow_views(images: Sequence[Image.Image], drawn: Sequence[OpBatch], side: int) -> np.ndarray:
    params = zip(*(op.params_per_image() for op in drawn), strict=True)
    return np.stack([apply_params(image, own, side) for image, own in zip(images, params, strict=True)])


@click.command(help=__doc__)
@click.option("--turns", default=5, help="Turns of each.", show_default=True)
def main(turns: int) -> None:
    """Runs all cases and prints a table."""
    torch.set_num_threads(1)
    table = Table("views", "augmentation", "Pillow", "machine code", "torch", "Pillow / machine code")
    for case in AUGMENTATION_CASES:
        for name, build in AUGMENTATIONS.items():
            found = measure_augmentations(case, build(case.side), turns)
            times = [f"{found[arm]:,.0f}" for arm in ("Pillow", "machine code", "torch")]
            table.add_row(case.label, name, *times, f"{found['Pillow'] / found['machine code']:.1f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
