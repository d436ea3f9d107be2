from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.library_backbones import from_torchvision
from firstlight.tasks.nn.norms import SyncBatchNorm

pytestmark = pytest.mark.usefixtures("repeated_draws")


BATCH_NORMALISED = [
    ("torchvision", "resnet18"),
    ("torchvision", "mobilenet_v3_small"),
    ("torchvision", "regnet_x_400mf"),
    ("timm", "resnet10t"),
    ("timm", "mobilenetv3_small_050"),  # its norms hold the activations
    ("timm", "resnetv2_18"),
]


@pytest.mark.parametrize(("library", "model"), BATCH_NORMALISED)
@pytest.mark.parametrize(("norm", "kind"), [("sync", SyncBatchNorm), ("group", nn.GroupNorm)])
def test_no_plain_batch_norm_is_left(library: str, model: str, norm: str, kind: type[nn.Module]) -> None:
    encoder = Encoder({"name": library, "model": model, "norm": norm, "input": "sobel"}, 32)
    found = [m for m in encoder.modules() if isinstance(m, _BatchNorm | nn.GroupNorm)]
    assert len(found) > 5
    assert all(isinstance(m, kind) for m in found)
    encoder(torch.rand(2, 3, 32, 32))[-1].square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)


@pytest.mark.parametrize(("library", "model"), BATCH_NORMALISED)
def test_sync_on_one_worker_is_batch(library: str, model: str) -> None:
    """No activation is lost with the norm that contained it."""
    torch.manual_seed(0)
    batch = Encoder({"name": library, "model": model}, 64)
    torch.manual_seed(0)
    sync = Encoder({"name": library, "model": model, "norm": "sync"}, 64)
    x = torch.rand(3, 3, 64, 64)
    for found, expected in zip(sync(x), batch(x), strict=True):
        torch.testing.assert_close(found, expected)
    for found, expected in zip(sync.eval()(x), batch.eval()(x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        ("resnet50", [(64, 48, 48), (256, 24, 24), (512, 12, 12), (1024, 6, 6), (2048, 3, 3)]),
        ("mobilenet_v3_small", [(16, 48, 48), (72, 24, 24), (96, 12, 12), (288, 6, 6), (576, 3, 3)]),
        ("squeezenet1_1", [(64, 47, 47), (128, 23, 23), (256, 11, 11), (512, 5, 5)]),  # not the map of its classifier
        (
            "googlenet",
            [(64, 48, 48), (192, 24, 24), (480, 12, 12), (832, 6, 6), (1024, 3, 3)],
        ),  # without its two other heads
        ("swin_t", [(96, 24, 24), (192, 12, 12), (384, 6, 6), (768, 3, 3)]),  # channels last inside
    ],
)
def test_maps_of_torchvision_are_the_last_at_each_resolution(model: str, shapes: list[tuple[int, ...]]) -> None:
    encoder = Encoder({"name": "torchvision", "model": model}, 96)
    assert encoder.shapes == shapes
    assert all(p.requires_grad for p in encoder.parameters())


def test_maps_of_torchvision_s_resnet_are_the_outputs_of_its_layers() -> None:
    """No map is the middle of a block that still has the size of the map before."""
    body: Any = from_torchvision(3, model="resnet50").eval()
    with torch.device("meta"):
        net = torchvision.models.resnet50()
    net.to_empty(device="cpu").eval().load_state_dict(body.net.state_dict(), strict=False)
    x = torch.rand(1, 3, 32, 32)
    expected = [net.relu(net.bn1(net.conv1(x)))]
    deeper = net.maxpool(expected[0])
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        deeper = layer(deeper)
        expected.append(deeper)
    for found, map_ in zip(body(x), expected, strict=True):
        torch.testing.assert_close(found, map_)


@pytest.mark.parametrize("model", ["swin_t", "swin_tiny_patch4_window7_224"])
def test_channels_come_first(model: str) -> None:
    library, size = ("timm", 224) if "tiny" in model else ("torchvision", 64)
    encoder = Encoder({"name": library, "model": model}, size)
    assert [c for c, _, _ in encoder.shapes] == [96, 192, 384, 768]
    assert [h for _, h, _ in encoder.shapes] == [size // 4, size // 8, size // 16, size // 32]


@pytest.mark.parametrize(
    ("library", "model"), [("torchvision", "resnet18"), ("torchvision", "squeezenet1_1"), ("timm", "resnet10t")]
)
def test_the_first_convolution_has_the_channels_of_the_input(library: str, model: str) -> None:
    for kind, channels in (("gray", 1), ("sobel", 2), ("rgb", 3)):
        encoder = Encoder({"name": library, "model": model, "input": kind}, 64)
        first = next(m for m in encoder.modules() if isinstance(m, nn.Conv2d))
        assert first.in_channels == channels
        assert encoder(torch.rand(1, 3, 64, 64), 1)[0].shape[1] == encoder.shapes[0][0]


@pytest.mark.parametrize(
    ("library", "model", "advice"),
    [
        ("torchvision", "resnet19", "'resnet18'"),
        ("torchvision", "fcn_resnet50", "'resnet50'"),  # not a classifier
        ("timm", "resnet10", "'resnet10t'"),
        ("timm", "resnet18.a1_in1k", "'resnet18'"),  # weights have no part here
        ("timm", "hf-hub:timm/resnet18.a1_in1k", "valid: the"),  # nor has the network
        ("timm", "", "valid: the"),
    ],
)
def test_unknown_model_raises_with_similar_names(library: str, model: str, advice: str) -> None:
    with pytest.raises(ValueError) as caught:
        Encoder({"name": library, "model": model}, 64)
    assert str(caught.value).startswith(f"model: {model!r} is unknown to {library}; ")
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    ("library", "model", "size"),
    [
        ("torchvision", "vit_b_32", 224),
        ("torchvision", "squeezenet1_1", 8),
        ("timm", "inception_v3", 32),
    ],
)
def test_network_without_maps_raises_one_line(
    library: str, model: str, size: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^model: '{model}' (of {library} gives no feature maps|cannot take images of {size} pixels): \S.+$",
    ):
        Encoder({"name": library, "model": model}, size)
    assert "Traceback" not in capfd.readouterr().err


def test_no_weights_are_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision._internally_replaced_utils.load_state_dict_from_url", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    for spec in (
        {"name": "torchvision", "model": "mobilenet_v3_small"},
        {"name": "timm", "model": "mobilenetv3_small_050"},
        {"name": "densenet121"},
    ):
        assert Encoder(spec, 64).shapes


def test_layers_after_the_deepest_map_are_frozen() -> None:
    encoder = Encoder({"name": "timm", "model": "hrnet_w18_small"}, 64)
    frozen = [name for name, p in encoder.named_parameters() if not p.requires_grad]
    assert any("fuse_layers" in name for name in frozen)  # of the last exchange, towards the finer maps
    encoder(torch.rand(2, 3, 64, 64))[-1].square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in encoder.parameters())
