"""The cores of a CPU and its arithmetic of bfloat16 in steps of a training: `python -m bench.cpu_cores`.

Forward pass, backward pass and update of networks on one batch, with one thread and with all cores, in single precision
and in bfloat16 (`precision: auto` has to choose the faster one), in images per second of wall time, the median of some
rounds. Threads wait for one another as `import firstlight` sets it: they spin briefly, then sleep. Other columns have
threads that sleep at once, or that spin as long as they wait, also beside one process that is busy.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from unittest import mock

import click
import torch
from rich.console import Console
from rich.table import Table

from bench.memory_format import FormatCase
from bench.own_process import run_in_own_process
from firstlight.pipeline.run.launching.threads import count_cores
from firstlight.pipeline.train.accelerator.cpu import set_up_cpu
from firstlight.pipeline.train.accelerator.grouped_convolutions import grouped_in_fp32
from firstlight.tasks.nn.encoders import Encoder

STEP_CASES = (
    FormatCase({"name": "convnet", "width": 16, "depth": 4}, 128, 32),
    FormatCase({"name": "convnet", "width": 32, "depth": 5}, 64, 64),
    FormatCase({"name": "torchvision", "model": "resnet18"}, 32, 128),
    FormatCase({"name": "torchvision", "model": "resnet50"}, 8, 224),
    FormatCase({"name": "timm", "model": "vit_small_patch16_224"}, 8, 224),
    FormatCase({"name": "timm", "model": "tf_efficientnet_lite0"}, 16, 128),
)

# The variables that tell OpenMP how threads wait, by the name of the way.
WAYS_TO_WAIT = {
    "briefly": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"},
    "sleep": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"},
    "spin": {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "infinite"},
}

# The threads of torch and the number format of the steps.
CoreArm = tuple[int, str]


@dataclass(frozen=True)
class CoreSetting:
    """The way threads wait, one of `WAYS_TO_WAIT`, the number of busy processes beside them, and the measured arms."""

    wait: str
    busy: int
    arms: tuple[CoreArm, ...]


def list_settings(cores: int) -> tuple[CoreSetting, ...]:
    """Returns the settings of the table."""
    alone = CoreSetting("briefly", 0, ((1, "fp32"), (1, "bf16"), (cores, "fp32"), (cores, "bf16")))
    asleep = CoreSetting("sleep", 0, ((cores, "fp32"), (cores, "bf16")))
    return alone, asleep, *(CoreSetting(way, 1, ((cores, "fp32"),)) for way in WAYS_TO_WAIT)


def measure_step_rates(cases: Sequence[FormatCase], setting: CoreSetting, seconds: float) -> list[list[float]]:
    """Returns the images per second of wall time of the arms, for each case, measured in a new process."""
    # OpenMP reads it when the new process imports torch.
    way = mock.patch.dict(os.environ, WAYS_TO_WAIT[setting.wait])
    with way, _busy_processes(setting.busy):
        return run_in_own_process(_time_arms, cases, setting.arms, seconds)


def _time_arms(cases: Sequence[FormatCase], arms: Sequence[CoreArm], seconds: float) -> list[list[float]]:
    return [[time_steps(case, arm, seconds) for arm in arms] for case in cases]


def time_steps(case: FormatCase, arm: CoreArm, seconds: float) -> float:
    """Returns the images per second of steps in this process, which take `seconds` or longer."""
    threads, precision = arm
    set_up_cpu(threads)
    torch.manual_seed(0)
    layout = torch.channels_last
    network = Encoder(case.spec, case.side).train().to(memory_format=layout)  # type: ignore[call-overload]
    images = torch.rand(case.images, 3, case.side, case.side).to(memory_format=layout)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)

    def take_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = network(images)[-1].float().square().mean()
        loss.backward()
        optimizer.step()

    # Trainings in bfloat16 do so; in single precision it changes nothing.
    with grouped_in_fp32(network):
        take_step()
        begun, steps = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            take_step()
            steps += 1
        return case.images * steps / (time.perf_counter() - begun)


@contextmanager
def _busy_processes(count: int) -> Iterator[None]:
    """Keeps CPUs busy meanwhile."""
    processes = [multiprocessing.get_context("spawn").Process(target=_stay_busy, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _stay_busy() -> None:
    while True:
        pass


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=0.0, min_open=True), default=3.0, show_default=True)
def main(rounds: int, seconds: float) -> None:
    """Prints the median rates of all arms."""
    settings = list_settings(count_cores())
    found = [[measure_step_rates(STEP_CASES, setting, seconds) for setting in settings] for _ in range(rounds)]
    columns = [_describe_column(setting, arm) for setting in settings for arm in setting.arms]
    table = Table(title="images/s: threads, number format, how they wait, beside how many busy processes")
    table.add_column("network, images", max_width=24)
    for column in columns:
        table.add_column(column, justify="right")
    for k, case in enumerate(STEP_CASES):
        in_rounds = [[rate for rates in one_round for rate in rates[k]] for one_round in found]
        rates = (median(of_arm) for of_arm in zip(*in_rounds, strict=True))
        table.add_row(case.label, *(f"{rate:,.{0 if rate >= 1000 else 1}f}" for rate in rates))
    Console(width=120).print(table)


def _describe_column(setting: CoreSetting, arm: CoreArm) -> str:
    threads, precision = arm
    # One thread waits for no other.
    waiting = "" if threads == 1 else f"\n{setting.wait}"
    beside = f"\nbeside {setting.busy}" if setting.busy else ""
    return f"{threads} {precision}{waiting}{beside}"


if __name__ == "__main__":
    main()
