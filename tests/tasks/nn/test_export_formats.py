"""An encoder's weights give the same features in the libraries' own networks, or there is a reason why not."""

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from firstlight.tasks.nn.encoders import Encoder, pool_maps
from firstlight.tasks.nn.export_formats import (
    MAP_TOLERANCE,
    ExportGraph,
    explain_missing_format,
    export_program,
    find_counterpart,
    measure_difference,
)

SIZE = 32


pytestmark = pytest.mark.usefixtures("repeated_draws")


def trained(**spec: Any) -> Encoder:
    """An encoder whose running statistics are not those of a new network, so a forgotten tensor shows."""
    torch.manual_seed(3)
    encoder = Encoder(spec, SIZE).train()
    with torch.no_grad():
        encoder(torch.rand(2, 3, SIZE, SIZE))
    return encoder.eval()


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(count))


def features(encoder: Encoder, x: torch.Tensor) -> torch.Tensor:
    return encoder(x)[-1].mean((2, 3))


@pytest.mark.parametrize(
    ("spec", "head"),
    [
        ({"name": "resnet18"}, "fc"),
        ({"name": "resnet18", "norm": "sync"}, "fc"),
        ({"name": "densenet121", "norm": "sync"}, "classifier"),
    ],
)
@torch.no_grad()
def test_torchvision_s_own_network_gives_the_same_features(spec: dict[str, Any], head: str) -> None:
    encoder = trained(**spec, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    state = find_counterpart(encoder, "torchvision").library_state(encoder)
    with torch.device("meta"):
        net = torchvision.models.get_model(spec["name"], num_classes=7)
    missing, unexpected = net.load_state_dict(state, strict=False, assign=True)
    assert (sorted(missing), unexpected) == ([f"{head}.bias", f"{head}.weight"], [])
    setattr(net, head, nn.Identity())
    x = images(3)
    normalised = torchvision.transforms.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))(x)
    assert measure_difference(features(encoder, x), net.eval()(normalised))[1] < MAP_TOLERANCE


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "resnet18"},
        {"name": "densenet121"},
        {"name": "timm", "model": "resnet10t"},
        {"name": "timm", "model": "resnet10t", "norm": "sync"},
        {"name": "timm", "model": "efficientnet_lite0"},
        {"name": "timm", "model": "convnext_atto"},
    ],
)
@torch.no_grad()
def test_timm_s_own_network_gives_the_same_features(spec: dict[str, Any]) -> None:
    encoder = trained(**spec)
    found = find_counterpart(encoder, "timm")
    net = timm.create_model(found.model, num_classes=0, global_pool="avg")
    missing, unexpected = net.load_state_dict(found.library_state(encoder), strict=False)
    assert unexpected == []
    x, normalised = images(2), (images(2) - 0.5) / 0.25
    if found.source == "forward_features" and found.model != "convnext_atto":  # this one has a norm behind its pooling
        assert missing == []
        assert measure_difference(features(encoder, x), net.eval()(normalised))[1] < MAP_TOLERANCE
    map_ = found.last_map(net.eval())(normalised)
    assert measure_difference(encoder(x)[-1], map_)[1] < MAP_TOLERANCE


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("test_vit", {"img_size": SIZE, "patch_size": 8}),
        # Position embeddings for 64 pixels, resampled for 32.
        ("test_vit", {"img_size": 64, "patch_size": 8}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": SIZE, "patch_size": 8}),
        ("swin_tiny_patch4_window7_224", {"img_size": SIZE}),
    ],
)
@torch.no_grad()
def test_a_transformer_in_timm_has_its_sizes_and_gives_the_same_map(model: str, options: dict[str, int]) -> None:
    encoder = trained(name="timm", model=model, **options)
    for name, parameter in encoder.named_parameters():
        if name.endswith("model.norm.weight"):
            parameter.uniform_(0.5, 2.0)
    found = find_counterpart(encoder, "timm")
    assert options.items() <= found.options.items()
    net: Any = timm.create_model(model, **found.options).eval()
    missing, unexpected = net.load_state_dict(found.library_state(encoder), strict=False)
    assert unexpected == []
    # timm's DINOv2 has no head.
    heads = {"swin_tiny_patch4_window7_224": {"head", "norm"}, "test_vit": {"head"}}.get(model, set())
    assert {name.split(".")[0] for name in missing} == heads
    normalised = (images(2) - 0.5) / 0.25
    maps = encoder(images(2))
    assert measure_difference(maps[-1], found.last_map(net)(normalised))[1] < MAP_TOLERANCE
    if encoder.has_class_token:
        token = net.forward_features(normalised)[:, 0]
        assert measure_difference(pool_maps(maps, "cls"), token)[1] < MAP_TOLERANCE


@torch.no_grad()
def test_vgg16_is_torchvision_s_with_batch_normalisation() -> None:
    encoder = trained(name="vgg16")
    with torch.device("meta"):
        net = torchvision.models.vgg16_bn()
    missing, unexpected = net.load_state_dict(
        find_counterpart(encoder, "torchvision").library_state(encoder), strict=False, assign=True
    )
    assert ({name.split(".")[0] for name in missing}, unexpected) == ({"classifier"}, [])
    assert measure_difference(encoder(images(2))[-1], net.eval().features((images(2) - 0.5) / 0.25))[1] < MAP_TOLERANCE


@torch.no_grad()
def test_network_with_channels_last_equals_torchvisions() -> None:
    encoder = trained(name="torchvision", model="swin_t")
    found = find_counterpart(encoder, "torchvision")
    net, missing = found.build_network(found.library_state(encoder))
    assert {name.split(".")[0] for name in missing} == {"head"}
    assert measure_difference(encoder(images(1))[-1], found.last_map(net)((images(1) - 0.5) / 0.25))[1] < MAP_TOLERANCE


@pytest.mark.parametrize(
    ("spec", "library", "reason"),
    [
        ({"name": "alexnet"}, "torchvision", "torchvision has no network like encoder.name: alexnet"),
        ({"name": "convnet"}, "timm", "timm has no network like encoder.name: convnet"),
        ({"name": "resnet18", "stem": "cifar"}, "timm", "encoder.stem: cifar"),
        ({"name": "resnet18", "norm": "group"}, "torchvision", "encoder.norm: group"),
        ({"name": "resnet18", "input": "sobel"}, "torchvision", "encoder.input: sobel"),
        ({"name": "resnet18", "input": "rgb_sobel"}, "timm", "encoder.input: rgb_sobel"),
        ({"name": "timm", "model": "resnet10t"}, "torchvision", "it is 'resnet10t' of timm"),
    ],
)
def test_missing_counterpart_has_a_reason(spec: dict[str, Any], library: str, reason: str) -> None:
    message = explain_missing_format(Encoder(spec, 64), library)
    assert message is not None
    assert reason in message


def test_search_for_a_counterpart_changes_neither_encoder_nor_random_state() -> None:
    encoder = trained(name="resnet18").train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert [
        explain_missing_format(encoder, format)
        for format in ("torchvision", "timm", "safetensors", "onnx", "torch_export")
    ] == [None] * 5
    assert torch.equal(torch.rand(1), expected), "no random number was drawn"
    assert encoder.training
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    "spec", [{"input": "rgb_sobel", "normalize": "image"}, {"input": "gray", "norm": "sync"}, {"input": "high_pass"}]
)
@torch.no_grad()
def test_graph_contains_the_input_and_takes_any_number_of_images(spec: dict[str, Any]) -> None:
    encoder = trained(name="convnet", width=4, **spec)
    program = export_program(encoder).module()
    for count in (1, 2, 7):
        for own, other in zip(ExportGraph(encoder)(images(count)), program(images(count)), strict=True):
            assert measure_difference(own, other)[1] < MAP_TOLERANCE


def test_difference_is_relative_and_infinite_for_nan() -> None:
    own = torch.tensor([1.0, -4.0])
    assert measure_difference(own, own + torch.tensor([0.0, 1.0])) == (1.0, 0.25)
    assert measure_difference(own, torch.tensor([1.0, float("nan")]))[1] == float("inf")
    assert measure_difference(torch.zeros(2), torch.ones(2))[1] > 1e6
