"""Memory that a process keeps between two steps, against memory that it returns: `python -m bench.host_memory`.

Each arm is a process of its own on one thread: with `set_up_cpu`, which trainings and evaluations call, and as the C
library is by default. The arms take turns. CPU seconds are split into those of the process and those of the system,
which clears the pages that it hands out.
"""

import resource
import statistics
from collections.abc import Callable
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from bench.own_process import run_in_own_process
from firstlight.pipeline.train.accelerator.cpu import set_up_cpu
from firstlight.tasks.nn.encoders import Encoder, pool_maps

KEPT, RETURNED = "kept", "returned"
# Name -> the encoder's section, the side and the number of its images, the number of steps, and True to train.
MEMORY_CASES: dict[str, tuple[dict[str, Any], int, int, int, bool]] = {
    "features of 256 images of 128 px, EfficientNet-Lite0": (
        {"name": "timm", "model": "tf_efficientnet_lite0"},
        128,
        256,
        3,
        False,
    ),
    "a step on 256 views of 64 px, convnet of width 32": (
        {"name": "convnet", "width": 32, "depth": 5},
        64,
        256,
        6,
        True,
    ),
    "a step on 512 views of 32 px, convnet of width 16": (
        {"name": "convnet", "width": 16, "depth": 4},
        32,
        512,
        12,
        True,
    ),
}


def measure_case(name: str, arm: str) -> dict[str, float]:
    """Returns the CPU seconds of this process and of the system for the steps of a case, and its peak of memory."""
    set_threads = set_up_cpu if arm == KEPT else torch.set_num_threads
    set_threads(1)
    spec, side, images, steps, trains = MEMORY_CASES[name]
    network = Encoder(spec, side).to(memory_format=torch.channels_last)
    views = torch.rand(images, 3, side, side)

    def train() -> None:
        pool_maps(network(views), "avg").square().mean().backward()

    def embed() -> None:
        with torch.no_grad():
            network(views)

    step: Callable[[], None] = train if trains else embed
    network.train(trains)
    step()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(steps):
        step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "own": after.ru_utime - before.ru_utime,
        "system": after.ru_stime - before.ru_stime,
        "peak_mb": after.ru_maxrss / 1024,
    }


def compare_arms(name: str, rounds: int) -> dict[str, dict[str, float]]:
    """Returns the medians of both arms, each measured in a new process in every round."""
    found: dict[str, list[dict[str, float]]] = {KEPT: [], RETURNED: []}
    for _ in range(rounds):
        for arm, rows in found.items():
            rows.append(run_in_own_process(measure_case, name, arm))
    return {arm: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for arm, rows in found.items()}


@click.command(help=__doc__)
@click.option("--rounds", type=int, default=3, show_default=True)
def main(rounds: int) -> None:
    """Compares both arms in all cases."""
    table = Table("work", "CPU s: own + system, kept", "returned", "kept / returned", "peak, kept / returned")
    for name in MEMORY_CASES:
        rows = compare_arms(name, rounds)
        kept, returned = rows[KEPT], rows[RETURNED]
        cells = [f"{row['own']:.1f} + {row['system']:.1f}" for row in (kept, returned)]
        ratio = (kept["own"] + kept["system"]) / (returned["own"] + returned["system"])
        table.add_row(name, *cells, f"{ratio:.2f}", f"{kept['peak_mb']:,.0f} / {returned['peak_mb']:,.0f} MB")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
