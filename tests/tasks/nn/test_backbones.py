from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from firstlight.tasks.nn.backbones import network1, network2, replace_batch_norm
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.norms import Norm, SyncBatchNorm

NAMED = ["convnet", "alexnet", "resnet18", "vgg16", "densenet121", "network1", "network2", "sc_convnet", "wide_resnet"]


pytestmark = pytest.mark.usefixtures("repeated_draws")


def convolutions(stages: list[nn.Module]) -> list[tuple[int, int, int]]:
    """Returns (channels in, out, stride) of each 3x3 convolution; each stage has one."""
    found = []
    for stage in stages:
        (conv,) = [m for m in stage.modules() if isinstance(m, nn.Conv2d)]
        assert (conv.kernel_size, conv.padding) == ((3, 3), (1, 1))
        found.append((conv.in_channels, conv.out_channels, conv.stride[0]))
    return found


def test_network1_for_cifar_is_table_1() -> None:
    first = [(3, 64, 1), *[(64, 64, 1)] * 3, (64, 64, 2)]
    second = [(64, 128, 1), *[(128, 128, 1)] * 3, (128, 128, 2)]
    third = [(128, 256, 1), *[(256, 256, 1)] * 3, (256, 256, 2)]
    assert convolutions(network1(3)) == first + second + third


def test_network1_for_stl_is_table_1() -> None:
    found = convolutions(network1(3, m=(3, 3, 4, 5), width=8))
    assert len(found) == 15  # the 30-layer auto-encoder of section 4.2.3
    assert [place for place, (_, _, stride) in enumerate(found, 1) if stride == 2] == [3, 6, 10, 15]
    assert [out for _, out, _ in found] == [8] * 3 + [16] * 3 + [32] * 4 + [64] * 5


def test_network2_is_table_1() -> None:
    found = convolutions(network2(3))
    assert [out for _, out, _ in found] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    assert [place for place, (_, _, stride) in enumerate(found, 1) if stride == 2] == [2, 4, 7, 10, 13]


@pytest.mark.parametrize(("size", "sides"), [(29, [29, 15, 8, 4]), (32, [32, 16, 8, 4]), (89, [89, 45, 23, 12])])
def test_network1_halves_rounding_up(size: int, sides: list[int]) -> None:
    encoder = Encoder({"name": "network1", "width": 1}, size)
    assert list(dict.fromkeys(h for _, h, _ in encoder.shapes)) == sides


def test_network1_without_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^m: \[0, 0, 0, 0\] leaves no convolution"):
        Encoder({"name": "network1", "m": [0, 0, 0, 0]}, 32)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize(("norm", "kind"), [("batch", _BatchNorm), ("sync", SyncBatchNorm), ("group", nn.GroupNorm)])
def test_norm_reaches_every_layer(name: str, norm: Norm, kind: type[nn.Module]) -> None:
    encoder = Encoder({"name": name, "norm": norm}, 64)
    found = [m for m in encoder.modules() if isinstance(m, _BatchNorm | nn.GroupNorm)]
    assert found
    assert all(isinstance(m, kind) for m in found)


@pytest.mark.parametrize("name", ["densenet121", "vgg16"])
def test_norms_have_as_many_names_in_the_state_dict(name: str) -> None:
    batch, sync = (Encoder({"name": name, "norm": norm}, 64).state_dict() for norm in ("batch", "sync"))
    assert list(batch) == list(sync)


def test_with_norm_keeps_the_other_settings() -> None:
    net: Any = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.BatchNorm2d(8, eps=0.5, momentum=0.3),
        nn.Sequential(nn.BatchNorm2d(8, affine=False)),
        nn.LayerNorm(4),
    )
    nn.init.constant_(net[1].weight, 0.25)
    nn.init.constant_(net[1].bias, 0.75)
    for norm in ("sync", "group"):
        found: Any = replace_batch_norm(nn.Sequential(*net), norm)  # type: ignore[arg-type]
        assert found[1].eps == 0.5
        assert found[1].weight.tolist() == [0.25] * 8
        assert found[1].bias.tolist() == [0.75] * 8
        assert isinstance(found[3], nn.LayerNorm)
        assert [p.requires_grad for p in found[1].parameters()] == [True, True]
    assert [
        p.requires_grad for p in replace_batch_norm(nn.Sequential(nn.BatchNorm2d(8, affine=False)), "sync").parameters()
    ] == [False, False]
    slow = replace_batch_norm(nn.Sequential(nn.BatchNorm2d(8, momentum=0.3)), "sync")
    assert slow[0].momentum == 0.3  # type: ignore[index]


def test_with_norm_replaces_a_layer_used_twice_by_one() -> None:
    shared = nn.BatchNorm2d(4)
    net: Any = replace_batch_norm(nn.Sequential(shared, nn.Sequential(shared)), "group")
    assert net[0] is net[1][0]


def test_sync_on_one_worker_is_batch() -> None:
    torch.manual_seed(0)
    batch = Encoder({"name": "densenet121", "norm": "batch"}, 32)
    sync = Encoder({"name": "densenet121", "norm": "sync"}, 32)
    sync.load_state_dict(batch.state_dict())
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(sync(x)[-1], batch(x)[-1])
    torch.testing.assert_close(sync.state_dict(), batch.state_dict())


@pytest.mark.parametrize(
    ("name", "reference"), [("densenet121", "densenet121"), ("vgg16", "vgg16_bn"), ("resnet18", "resnet18")]
)
def test_network_of_torchvision_equals_torchvisions(name: str, reference: str) -> None:
    """torchvision's own network gives the same maps with the weights, copied in their order."""
    encoder = Encoder({"name": name, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}, 64).eval()
    with torch.device("meta"):
        whole = torchvision.models.get_model(reference, weights=None)
    trunk = whole.features if hasattr(whole, "features") else nn.Sequential(*list(whole.children())[:-2])
    trunk = trunk.to_empty(device="cpu").eval()
    trunk.load_state_dict(dict(zip(trunk.state_dict(), encoder.state_dict().values(), strict=True)))
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(encoder(x)[-1], trunk(x).relu())


def test_next_stage_does_not_change_a_map() -> None:
    for name in NAMED:
        encoder = Encoder({"name": name}, 64).eval()
        x = torch.rand(1, 3, 64, 64)
        for depth, map_ in enumerate(encoder(x), 1):
            torch.testing.assert_close(map_, encoder(x, depth=depth)[-1], msg=f"{name} {depth}")


def test_sc_convnet_is_the_port_s() -> None:
    stages: Any = Encoder({"name": "sc_convnet"}, 32).stages
    found = [[(m.out_channels, m.kernel_size[0]) for m in stage if isinstance(m, nn.Conv2d)] for stage in stages]
    assert found == [[(96, 3)] * 3, [(192, 3)] * 3, [(192, 3), (192, 1)]]
    assert {m.negative_slope for m in stages.modules() if isinstance(m, nn.LeakyReLU)} == {0.3}
