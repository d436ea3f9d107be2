"""The comparison of threads and number formats: what its arms are, and that each runs as it says."""

import os

import pytest
import torch

from bench import cpu_cores
from bench.cpu_cores import CoreSetting, list_settings, measure_step_rates, time_steps
from bench.memory_format import FormatCase

SMALL = FormatCase({"name": "convnet", "width": 4, "depth": 2}, 4, 8)


def test_both_formats_are_measured_with_one_thread_and_with_all() -> None:
    alone, sleeping, spinning = list_settings(6)
    assert alone.arms == ((1, "fp32"), (1, "bf16"), (6, "fp32"), (6, "bf16"))
    assert (sleeping.wait, sleeping.busy) == ("passive", 1)
    assert (spinning.wait, spinning.busy) == ("active", 1)


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


def test_arms_run_in_a_process_with_the_policy_and_leave_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    ((rate,),) = measure_step_rates([SMALL], CoreSetting("active", 1, ((1, "fp32"),)), 0.01)
    assert rate > 0
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
