"""The comparison of threads and number formats: what its arms are, and that each runs as it says."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import cpu_cores
from bench.cpu_cores import WAYS_TO_WAIT, CoreSetting, list_settings, measure_step_rates, time_steps
from bench.memory_format import FormatCase

SMALL = FormatCase({"name": "convnet", "width": 4, "depth": 2}, 4, 8)


def test_both_formats_are_measured_with_one_thread_and_with_all() -> None:
    alone, asleep, *beside = list_settings(6)
    assert alone == CoreSetting("briefly", 0, ((1, "fp32"), (1, "bf16"), (6, "fp32"), (6, "bf16")))
    assert asleep == CoreSetting("sleep", 0, ((6, "fp32"), (6, "bf16")))
    assert [(setting.wait, setting.busy) for setting in beside] == [("briefly", 1), ("sleep", 1), ("spin", 1)]


def test_threads_wait_briefly_where_the_package_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    show = "import firstlight, json, os; print(json.dumps(dict(os.environ)))"
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout).items() >= WAYS_TO_WAIT["briefly"].items()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_have_the_threads_and_the_format_of_their_arm(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    before, formats = torch.get_num_threads(), set[torch.dtype]()
    step = torch.optim.SGD.step

    def take_step(self: torch.optim.SGD) -> None:
        formats.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        assert torch.get_num_threads() == 2
        step(self)

    build = cpu_cores.Encoder

    class Seen(build):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> object:
            maps = super().forward(x)
            formats.add(maps[-1].dtype)
            return maps

    monkeypatch.setattr(cpu_cores, "Encoder", Seen)
    monkeypatch.setattr(torch.optim.SGD, "step", take_step)
    try:
        assert time_steps(SMALL, (2, precision), 0.01) > 0
    finally:
        torch.set_num_threads(before)
    assert (torch.bfloat16 in formats) == (precision == "bf16")


def test_arms_run_in_a_process_that_waits_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    ((rate,),) = measure_step_rates([SMALL], CoreSetting("spin", 1, ((1, "fp32"),)), 0.01)
    assert rate > 0
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
