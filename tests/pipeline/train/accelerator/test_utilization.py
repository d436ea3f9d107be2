"""The share of a device's operations that a training makes."""

from pathlib import Path

import pytest
import torch

from bench.training_cases import METHOD_TRAININGS, build_case_job, feed_noise
from firstlight.pipeline.train.accelerator import utilization
from firstlight.pipeline.train.accelerator.utilization import UtilizationMeter, find_peak_flops
from firstlight.pipeline.train.loop import fit
from firstlight.pipeline.train.metrics import METRICS_FILE, read_metrics

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.float16, 756e12),
        ("NVIDIA A100-SXM4-80GB", None, 156e12),
        ("A toaster", torch.bfloat16, None),
    ],
)
def test_peak_is_that_of_the_device_and_the_number_format(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype | None, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert find_peak_flops(GPU, dtype) == peak
    assert find_peak_flops(CPU, dtype) is None


def test_operations_of_one_step_are_counted_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilization, "find_peak_flops", lambda device, dtype: 1000.0)
    meter, network, images = UtilizationMeter(CPU, None), torch.nn.Linear(5, 3, bias=False), torch.ones(4, 5)
    for _ in range(2):
        meter.take_step(lambda: network(images).sum().backward(), 4)
    # A product forward and, as the images have no gradient, one backward: 2 x 4 x 5 x 3 operations each.
    assert meter.flops_per_image == 2 * 2 * 5 * 3
    assert meter.compute_share(100.0) == {"mfu": pytest.approx(100.0 * 60 / 1000.0)}


@pytest.mark.parametrize("is_known", [False, True])
def test_share_is_logged_where_the_peak_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    if is_known:
        monkeypatch.setattr(utilization, "find_peak_flops", lambda device, dtype: 1e12)
    case = METHOD_TRAININGS[0]
    options = {"epochs": 1, "batch_size": 8, "optimizer": {"name": "SGD", "lr": 0.01}, "log_every": 1}
    with feed_noise(case, 32):
        fit(build_case_job(tmp_path, options, 24, CPU), case.build_learner(32, 24, 1, 3))
    rows = read_metrics(tmp_path / METRICS_FILE)
    assert len(rows) == 3
    assert all(("mfu" in row) == is_known for row in rows)
    if is_known:
        shares = [row["mfu"] / row["images_per_s"] for row in rows]
        assert shares == pytest.approx([shares[0]] * 3)
