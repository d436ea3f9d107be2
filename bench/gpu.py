"""Training on a GPU: each method's bare step against the training loop, as a table: `python -m bench.gpu`.

ResNet-18 with a stem for 32 x 32 pixels, ResNet-50 and ViT-S at 224, in bf16 and with channels_last. The loop trains on
images that are held decoded on the device, and on images that are streamed. Then SimCLR's bare step is taken with each
of what makes it faster added in turn. All is within `--minutes`, the most telling rows first, and what was not reached
is named. The rows go to one file as well. On a CPU, `--small` runs the same with small networks on a few small images,
to see that it works.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from bench.timed_training import StepRate, TimedTraining, make_timed_recipe, write_noise_photographs
from firstlight.pipeline.train.accelerator.utilization import find_peak_flops
from firstlight.pipeline.train.backward_pass import find_autocast
from firstlight.pipeline.usable_cpus import count_decoders, count_usable_cpus

GPU_AUGMENT: list[dict[str, Any]] = [{"op": "random_resized_crop", "scale": [0.2, 1.0]}, {"op": "horizontal_flip"}]


@dataclass(frozen=True)
class BenchNetwork:
    """A network with its images."""

    name: str
    encoder: dict[str, Any]
    size: int
    batch: int
    images: int

    @property
    def is_vit(self) -> bool:
        return str(self.encoder["name"]) == "timm"


RESNET18 = {"name": "resnet18", "stem": "cifar"}
VIT_SMALL = {"name": "timm", "model": "vit_small_patch16_224"}
GPU_NETWORKS = (
    BenchNetwork("ResNet-18, 32", RESNET18, 32, 512, 4096),
    BenchNetwork("ResNet-50, 224", {"name": "resnet50"}, 224, 256, 1024),
    BenchNetwork("ViT-S, 224", VIT_SMALL, 224, 256, 1024),
)
SMALL_NETWORKS = (
    BenchNetwork("convnet, 32", {"name": "convnet", "width": 8, "depth": 3}, 32, 8, 32),
    BenchNetwork("small ViT, 32", {"name": "timm", "model": "test_vit", "img_size": 32, "patch_size": 8}, 32, 8, 32),
)
# The settings of a method that a table row is measured with, where its defaults do not fit.
GPU_METHODS: dict[str, dict[str, Any]] = {
    "simclr": {},
    "nat": {"dim": 128, "hidden": (), "pool": "avg"},
    "super_and": {"rounds": 1},
    "clustering_locality": {"supervised": False, "alpha": 0.5, "beta": 0.5},
    "dae": {},
    "spatial_contrasting": {"patch_size": 2},
    "byol": {},
    "vicreg": {},
    "dino": {},
    "mae": {},
    "lejepa": {},
    "fixmatch": {},
    "distill": {},
}
# Methods that need a ViT, and that need a network that is not one.
VIT_METHODS, CONVOLUTION_METHODS = ("mae",), ("dae",)
BEST_OPTIONS: dict[str, Any] = {"precision": "auto", "channels_last": True}
# The options that are added to SimCLR's bare step in turn.
OPTION_STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fp32", {"precision": "fp32", "fused": False}),
    ("+ bf16", {"precision": "bf16", "fused": False}),
    ("+ channels_last", {"precision": "bf16", "channels_last": True, "fused": False}),
    ("+ fused optimiser", {"precision": "bf16", "channels_last": True}),
    ("+ compile", {"precision": "bf16", "channels_last": True, "compile": True}),
)


@dataclass(frozen=True)
class MeasuredRow:
    """A row of the table; `loop` is null for a bare step."""

    network: str
    method: str
    arm: str
    rate: StepRate
    # The operations of a step on an image, and the share of the device's peak; null where it is not known.
    flops_per_image: float
    mfu: float | None


class GpuBench:
    """All measurements of the command, until its time is over."""

    def __init__(
        self, root: Path, device: torch.device, networks: Sequence[BenchNetwork], steps: int, end: float
    ) -> None:
        self.root, self.device, self.networks, self.end = root, device, networks, end
        self.steps, self.warmup = steps, max(steps // 4, 1)
        # The number of decoding tasks that a recipe chooses for a GPU; a training on CPUs has one.
        self.tasks = count_decoders(count_usable_cpus()) if device.type == "cuda" else 1
        self.rows: list[MeasuredRow] = []
        self.skipped: list[str] = []
        self.folders: dict[int, Path] = {}

    def run(self, methods: Sequence[str], compiles: bool) -> None:
        """Measures all rows: first each method, then the options."""
        for method in methods:
            for network in self.networks:
                if not _fits(method, network):
                    continue
                self._measure_method(network, method)
        for network in self.networks:
            for arm, options in OPTION_STEPS:
                if options.get("compile") and not compiles:
                    continue
                self._attempt(network, "simclr", arm, options, "off")

    def _measure_method(self, network: BenchNetwork, method: str) -> None:
        for arm, resident in (("bare step", "off"), ("loop, resident", "on"), ("loop, streamed", "off")):
            self._attempt(network, method, arm, BEST_OPTIONS, resident)

    def _attempt(self, network: BenchNetwork, method: str, arm: str, options: dict[str, Any], resident: str) -> None:
        name = f"{network.name}: {method}, {arm}"
        if time.monotonic() > self.end:
            self.skipped.append(f"{name}: the time was over")
            return
        try:
            self.rows.append(self._measure(network, method, arm, options, resident))
        # One row that cannot be measured must not cost the others of an expensive minute.
        except Exception as error:
            self.skipped.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _measure(
        self, network: BenchNetwork, method: str, arm: str, options: dict[str, Any], resident: str
    ) -> MeasuredRow:
        training = TimedTraining(self._make_recipe(network, method, options, resident), self.device)
        flops = next((r.flops_per_image for r in self.rows if (r.network, r.method) == (network.name, method)), 0.0)
        if arm.startswith("loop"):
            rate = training.measure_loop(self.warmup)
        else:
            rate, flops = training.measure_bare_step(self.steps, self.warmup)
        dtype = find_autocast(training.stage.precision, self.device)
        peak = find_peak_flops(self.device, dtype)
        share = rate.images_per_s * flops / peak if peak and flops else None
        return MeasuredRow(network.name, method, arm, rate, flops, share)

    def _make_recipe(self, network: BenchNetwork, method: str, options: dict[str, Any], resident: str) -> Any:
        if network.size not in self.folders:
            folder = self.root / f"images{network.size}"
            self.folders[network.size] = write_noise_photographs(folder, network.images, network.size)
        options = dict(options)
        update = {"fused": options.pop("fused")} if "fused" in options else {}
        teacher = {"teacher": dict(network.encoder)} if method == "distill" else {}
        labels = {"labelled_per_batch": network.batch // 8 or 1, "labels_fraction": 0.5} if method == "fixmatch" else {}
        stage = {
            "method": {"name": method, **GPU_METHODS[method], **teacher},
            "steps": self.warmup + self.steps,
            "batch_size": network.batch,
            "optimizer": {"name": "SGD", "lr": 1e-4, "momentum": 0.9, **update},
            # An epoch ends within a few steps here.
            "checkpoint_every": 10**9,
            **labels,
            **options,
        }
        return make_timed_recipe(
            self.folders[network.size],
            self.root,
            size=network.size,
            encoder=network.encoder,
            stage=stage,
            stream={"resident": resident, "augment": "device", "tasks": self.tasks},
            augment=GPU_AUGMENT,
            dataset={},
        )


def _fits(method: str, network: BenchNetwork) -> bool:
    return method not in (CONVOLUTION_METHODS if network.is_vit else VIT_METHODS)


def make_gpu_table(rows: Sequence[MeasuredRow]) -> Table:
    """Shows the rows; the ratio is to the bare step of the same network and method."""
    table = Table("network", "method", "", "images/s", "/ bare", "MFU", "data_wait", "peak MB")
    bare: dict[tuple[str, str], float] = {}
    for row in rows:
        place, rate = (row.network, row.method), row.rate
        bare.setdefault(place, rate.images_per_s)
        table.add_row(
            *place,
            row.arm,
            f"{rate.images_per_s:,.0f}",
            f"{rate.images_per_s / bare[place]:.2f}",
            "" if row.mfu is None else f"{row.mfu:.1%}",
            f"{rate.data_wait:.1%}" if row.arm.startswith("loop") else "",
            f"{rate.peak_bytes / 1e6:,.0f}" if rate.peak_bytes else "",
        )
    return table


def list_result_lines(bench: GpuBench) -> Iterator[str]:
    """Yields the lines of the file of results: the machine, then a row each, then what was not measured."""
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "cpu"
    yield json.dumps({"device": name, "torch": torch.__version__, "steps": bench.steps})
    yield from (json.dumps(asdict(row)) for row in bench.rows)
    yield from (json.dumps({"skipped": line}) for line in bench.skipped)


@click.command(help=__doc__)
@click.option("--small", is_flag=True, help="Small networks and few images, which a CPU can do.")
@click.option("--minutes", type=float, default=8.0, show_default=True, help="No row is begun later.")
@click.option("--methods", default=",".join(GPU_METHODS), show_default=True, help="Separated by commas.")
@click.option("--compile/--no-compile", "compiles", default=True, show_default=True, help="The row with torch.compile.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("gpu.jsonl"), show_default=True)
def main(small: bool, minutes: float, methods: str, compiles: bool, output: Path) -> None:
    """Measures, prints the table, and writes the rows."""
    end = time.monotonic() + minutes * 60
    device = torch.device("cuda" if torch.cuda.is_available() and not small else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        networks, steps = (SMALL_NETWORKS, 2) if small else (GPU_NETWORKS, 20)
        bench = GpuBench(Path(folder), device, networks, steps, end)
        bench.run(methods.split(","), compiles)
    output.write_text("".join(f"{line}\n" for line in list_result_lines(bench)), "utf-8")
    console = Console(width=130)
    console.print(make_gpu_table(bench.rows))
    for line in bench.skipped:
        console.print(f"not measured: {line}")


if __name__ == "__main__":
    main()
