"""Networks in two memory formats and two number formats, on one thread: `python -m bench.memory_format`.

Contiguous ones, those with channels_last, and those with channels_last in automatic mixed precision of bfloat16 take
turns on the same images. The table has the least CPU milliseconds of some turns, of the forward pass without
gradients, as frozen features take it, and of forward and backward pass in training.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from firstlight.pipeline.train.accelerator.grouped_convolutions import grouped_in_fp32
from firstlight.tasks.nn.encoders import Encoder

# The memory format of each arm, and whether it computes in bfloat16 where it can.
FORMAT_ARMS = {
    "contiguous": (torch.contiguous_format, False),
    "channels_last": (torch.channels_last, False),
    "channels_last, bf16": (torch.channels_last, True),
}


@dataclass(frozen=True)
class FormatCase:
    """The spec of an encoder, and the number and side of its images."""

    spec: dict[str, Any]
    images: int
    side: int

    @property
    def label(self) -> str:
        """The name of the network and its images."""
        name, width = self.spec.get("model", self.spec["name"]), self.spec.get("width")
        return f"{name}{f' of width {width}' if width else ''}, {self.images} of {self.side} pixels"


FORMAT_CASES = (
    FormatCase({"name": "convnet", "width": 16, "depth": 4}, 50, 48),
    FormatCase({"name": "convnet", "width": 32, "depth": 4}, 64, 64),
    FormatCase({"name": "timm", "model": "tf_efficientnet_lite0"}, 16, 128),
    FormatCase({"name": "timm", "model": "mobilenetv3_small_100"}, 16, 128),
    FormatCase({"name": "torchvision", "model": "resnet18"}, 16, 128),
    FormatCase({"name": "torchvision", "model": "resnet50"}, 8, 128),
    FormatCase({"name": "resnet18"}, 32, 32),
    FormatCase({"name": "alexnet"}, 32, 64),
    FormatCase({"name": "timm", "model": "vit_small_patch16_224"}, 4, 224),
)


def _run_forward(network: nn.Module, images: Tensor, in_bf16: bool) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
        network(images)


def _run_step(network: nn.Module, images: Tensor, in_bf16: bool) -> None:
    # Trainings keep grouped convolutions in single precision.
    with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16), grouped_in_fp32(network):
        loss = network(images)[-1].float().square().mean()
    loss.backward()
    network.zero_grad(set_to_none=True)


def measure_formats(case: FormatCase, turns: int) -> dict[str, tuple[float, float]]:
    """Returns the CPU milliseconds of the forward pass and of a training step, by the name of the arm."""
    torch.manual_seed(0)
    images = torch.rand(case.images, 3, case.side, case.side)
    networks = {}
    for name, (layout, _) in FORMAT_ARMS.items():
        torch.manual_seed(0)
        networks[name] = Encoder(case.spec, case.side).train().to(memory_format=layout)  # type: ignore[call-overload]
    found = {}
    for work in (_run_forward, _run_step):
        least = dict.fromkeys(networks, float("inf"))
        # The first turn also makes what later ones keep.
        for turn in range(turns + 1):
            for name, network in networks.items():
                taken = _measure_ms(work, network, images, FORMAT_ARMS[name][1])
                least[name] = min(least[name], taken) if turn else least[name]
        found[work] = least
    return {name: (found[_run_forward][name], found[_run_step][name]) for name in networks}


def _measure_ms(
    work: Callable[[nn.Module, Tensor, bool], None], network: nn.Module, images: Tensor, in_bf16: bool
) -> float:
    begun = time.process_time()
    work(network, images, in_bf16)
    return 1000 * (time.process_time() - begun)


@click.command(help=__doc__)
@click.option("--turns", type=click.IntRange(min=1), default=6, show_default=True)
def main(turns: int) -> None:
    """Prints the milliseconds of the arms, and their ratios to the contiguous one."""
    torch.set_num_threads(1)
    table = Table("network, images", "forward, ms", "ratios", "step, ms", "ratios", title=", ".join(FORMAT_ARMS))
    for case in FORMAT_CASES:
        cells = []
        for taken in zip(*measure_formats(case, turns).values(), strict=True):
            cells.append(", ".join(f"{ms:.0f}" for ms in taken))
            cells.append(", ".join(f"{ms / taken[0]:.2f}" for ms in taken[1:]))
        table.add_row(case.label, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
