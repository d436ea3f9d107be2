"""The comparison of memory formats: the same network and images in both, and the least of some turns."""

import pytest
import torch
from torch import Tensor, nn

from bench import memory_format
from bench.memory_format import FORMAT_CASES, FormatCase, measure_formats

SMALL = FormatCase({"name": "convnet", "width": 4, "depth": 2}, 3, 8)


def test_formats_have_the_same_network_and_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, Tensor, Tensor]] = []

    def keep(network: nn.Module, images: Tensor) -> None:
        weight = next(module.weight for module in network.modules() if isinstance(module, nn.Conv2d))
        seen.append((weight.is_contiguous(), weight.detach().clone(), images))

    monkeypatch.setattr(memory_format, "_run_forward", keep)
    found = measure_formats(SMALL, 1)
    assert list(found) == ["contiguous", "channels_last"]
    assert [is_contiguous for is_contiguous, _, _ in seen] == [True, False] * 2
    assert all(torch.equal(weight, seen[0][1]) for _, weight, _ in seen)
    assert all(images is seen[0][2] for _, _, images in seen)
    assert all(step > 0 for _, step in found.values())


def test_first_turn_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two formats in three turns, of the forward pass and of the step.
    taken = iter([1.0, 1.0, 7.0, 5.0, 6.0, 8.0, 1.0, 1.0, 9.0, 9.0, 9.0, 4.0])
    monkeypatch.setattr(memory_format, "_measure_ms", lambda *arguments: next(taken))
    assert measure_formats(SMALL, 2) == {"contiguous": (6.0, 9.0), "channels_last": (5.0, 4.0)}


def test_labels_name_network_and_images() -> None:
    assert FORMAT_CASES[0].label == "convnet of width 16, 50 of 48 pixels"
    assert FORMAT_CASES[2].label == "tf_efficientnet_lite0, 16 of 128 pixels"
