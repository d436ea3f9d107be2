"""The benchmark of a GPU, on a CPU: its rows, its table and its file."""

import json
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bench import gpu
from bench.timed_training import StepRate
from firstlight.tasks.pretrain import METHODS

CPU = torch.device("cpu")


def test_every_method_has_settings_and_fits_a_network() -> None:
    assert set(gpu.GPU_METHODS) == set(METHODS)
    assert all(any(gpu._fits(method, network) for network in gpu.GPU_NETWORKS) for method in METHODS)


def test_small_run_writes_the_rows_that_it_prints(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    options = ["--small", "--methods", "simclr", "--no-compile", "--output", str(file)]
    answer = CliRunner().invoke(gpu.main, options, catch_exceptions=False)
    machine, *rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert machine["device"] == "cpu"
    assert not [row for row in rows if "skipped" in row], rows
    arms = {row["arm"] for row in rows}
    assert arms == {"bare step", "loop, resident", "loop, streamed", *(name for name, _ in gpu.OPTION_STEPS[:-1])}
    assert len(rows) == len(arms) * len(gpu.SMALL_NETWORKS)
    assert all(row["rate"]["images_per_s"] > 0 and row["flops_per_image"] > 0 and row["mfu"] is None for row in rows)
    assert "loop, streamed" in answer.output


@pytest.mark.parametrize("method", [name for name in METHODS if name != "simclr"])
def test_every_method_is_measured_in_the_loop(tmp_path: Path, method: str) -> None:
    network = next(network for network in gpu.SMALL_NETWORKS if gpu._fits(method, network))
    bench = gpu.GpuBench(tmp_path, CPU, [network], 2, time.monotonic() + 600)
    bench._attempt(network, method, "loop, resident", {}, "on")
    assert not bench.skipped
    assert bench.rows[0].rate.images_per_s > 0


def test_rows_after_the_end_are_named(tmp_path: Path) -> None:
    bench = gpu.GpuBench(tmp_path, CPU, gpu.SMALL_NETWORKS[:1], 2, time.monotonic() - 1)
    bench.run(["simclr"], compiles=True)
    assert bench.rows == []
    assert len(bench.skipped) == 3 + len(gpu.OPTION_STEPS)
    assert all("the time was over" in line for line in bench.skipped)


def test_table_compares_with_the_bare_step() -> None:
    rows = [
        gpu.MeasuredRow("net", "simclr", "bare step", StepRate(100.0, 1.0), 1e9, 0.4),
        gpu.MeasuredRow("net", "simclr", "loop, resident", StepRate(95.0, 1.0, 0.02, 3_000_000), 1e9, None),
    ]
    table = gpu.make_gpu_table(rows)
    assert [*table.columns[4].cells] == ["1.00", "0.95"]
    assert [*table.columns[5].cells] == ["40.0%", ""]
    assert [*table.columns[6].cells] == ["", "2.0%"]
    assert [*table.columns[7].cells] == ["", "3"]
