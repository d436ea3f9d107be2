"""The comparison of memory formats: the same network and images in both, and the least of some turns."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bench import memory_format
from bench.memory_format import FORMAT_CASES, FormatCase, measure_formats
from firstlight.tasks.nn.encoders import Encoder

SMALL = FormatCase({"name": "convnet", "width": 4, "depth": 2}, 3, 8)


def test_formats_have_the_same_network_and_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool, Tensor, Tensor]] = []

    def keep(network: nn.Module, images: Tensor, in_bf16: bool) -> None:
        weight = next(module.weight for module in network.modules() if isinstance(module, nn.Conv2d))
        seen.append((weight.is_contiguous(), in_bf16, weight.detach().clone(), images))

    monkeypatch.setattr(memory_format, "_run_forward", keep)
    found = measure_formats(SMALL, 1)
    assert list(found) == ["contiguous", "channels_last", "channels_last, bf16"]
    assert [formats for *formats, _, _ in seen] == [[True, False], [False, False], [False, True]] * 2
    assert all(torch.equal(weight, seen[0][2]) for *_, weight, _ in seen)
    assert all(images is seen[0][3] for *_, images in seen)
    assert all(step > 0 for _, step in found.values())


@pytest.mark.parametrize("work", [memory_format._run_forward, memory_format._run_step])
def test_forward_pass_alone_is_in_bfloat16(work: Callable[..., None]) -> None:
    network = Encoder(SMALL.spec, SMALL.side)
    found: list[torch.dtype] = []
    network.stages[-1].register_forward_hook(lambda module, taken, maps: found.append(maps.dtype))
    for in_bf16 in (True, False):
        work(network, torch.rand(3, 3, 8, 8), in_bf16)
        assert not torch.is_autocast_enabled("cpu")
    assert found == [torch.bfloat16, torch.float32]


def test_first_turn_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    # Three arms in three turns, of the forward pass and of the step.
    forward, step = [1.0, 1.0, 1.0, 7.0, 5.0, 3.0, 6.0, 8.0, 2.0], [1.0, 1.0, 1.0, 9.0, 9.0, 3.0, 9.0, 4.0, 4.0]
    taken = iter([*forward, *step])
    monkeypatch.setattr(memory_format, "_measure_ms", lambda *arguments: next(taken))
    assert list(measure_formats(SMALL, 2).values()) == [(6.0, 9.0), (5.0, 4.0), (2.0, 3.0)]


def test_labels_name_network_and_images() -> None:
    assert FORMAT_CASES[0].label == "convnet of width 16, 50 of 48 pixels"
    assert FORMAT_CASES[2].label == "tf_efficientnet_lite0, 16 of 128 pixels"
