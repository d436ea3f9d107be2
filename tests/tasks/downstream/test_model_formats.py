"""A library's network with our classifier gives our logits; what has no counterpart says why."""

from typing import Any

import pytest
import torch

from firstlight.tasks.downstream import TASKS
from firstlight.tasks.downstream.classify import Classification
from firstlight.tasks.downstream.model_formats import (
    ModelGraph,
    explain_missing_model_format,
    export_model_program,
    find_classifier,
)
from firstlight.tasks.downstream.starting_weights import fold_encoder
from firstlight.tasks.nn.encoders import Encoder, MapPooling
from tests.support.saved_models import build_model

pytestmark = pytest.mark.usefixtures("repeated_draws")


def make_classifier(encoder: dict[str, Any], **options: Any) -> Classification:
    torch.manual_seed(0)
    network = Encoder(encoder, 32).train()
    network(torch.rand(4, 3, 32, 32))
    return Classification(network, 5, **options).eval()


@pytest.mark.parametrize(
    ("encoder", "library", "head"),
    [
        ({"name": "resnet18"}, "torchvision", "fc"),
        ({"name": "resnet18"}, "timm", "fc"),
        ({"name": "densenet121"}, "torchvision", "classifier"),
        ({"name": "torchvision", "model": "efficientnet_b0"}, "torchvision", "classifier.1"),
        ({"name": "torchvision", "model": "squeezenet1_1"}, "torchvision", ""),
    ],
)
def test_network_of_the_library_gives_the_logits_of_the_model(encoder: dict[str, Any], library: str, head: str) -> None:
    task = make_classifier(encoder)
    if not head:
        with pytest.raises(ValueError, match="squeezenet1_1 of torchvision is not one linear layer, but a Conv2d"):
            find_classifier(task, library)
        return
    found = find_classifier(task, library)
    assert found.head == (f"{head}.weight", f"{head}.bias")
    state = found.library_state(task)
    assert torch.equal(state[found.head[0]], task.head[0].weight)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own, there = ModelGraph(task)(images), found.build_network(state)(task.encoder.input(images))
    torch.testing.assert_close(there, own, rtol=1e-4, atol=1e-4 * float(own.abs().max()))
    with pytest.raises(ValueError, match="the weights do not fit"):
        found.build_network({**state, found.head[0]: torch.zeros(6, 3)})


@pytest.mark.parametrize(
    ("model", "pool", "arguments"),
    [
        ("test_vit", "cls", {}),
        ("test_vit", "avg", {"global_pool": "avg", "fc_norm": False}),
        ("eva02_tiny_patch14_224", "avg", {"use_fc_norm": False, "use_post_transformer_norm": False}),
    ],
)
def test_vit_of_timm_gives_the_logits_of_the_model(model: str, pool: MapPooling, arguments: dict[str, Any]) -> None:
    # A multiple of both sizes of patches.
    side = 112
    torch.manual_seed(0)
    task = Classification(Encoder({"name": "timm", "model": model, "img_size": side}, side), 5, pool=pool).eval()
    # The weight of a normalisation is one at first, and hides one too many.
    for tensor in task.parameters():
        tensor.data.add_(0.1 * torch.randn_like(tensor))
    found = find_classifier(task, "timm")
    assert found.encoder.options.items() >= {"img_size": side, **arguments}.items()
    assert found.head_name == "head"
    images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own, there = (
            ModelGraph(task)(images),
            found.build_network(found.library_state(task))(task.encoder.input(images)),
        )
    assert there.shape == (3, 5)
    torch.testing.assert_close(there, own, rtol=1e-4, atol=1e-4 * float(own.abs().max()))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("test_efficientnet", "not one linear layer: it has conv_head.weight, bn2.weight, bn2.bias and 4 more"),
        ("test_convnext", "not one linear layer: it has head.norm.weight, head.norm.bias, head.fc.weight and 1 more"),
    ],
)
def test_head_with_layers_of_its_own_is_named(model: str, reason: str) -> None:
    task = Classification(Encoder({"name": "timm", "model": model}, 64), 5)
    with pytest.raises(ValueError, match=f"the head of {model} of timm is {reason}"):
        find_classifier(task, "timm")


def test_pooling_that_timm_does_not_know_is_named() -> None:
    encoder = Encoder({"name": "timm", "model": "test_vit", "img_size": 32}, 32)
    with pytest.raises(ValueError, match=r"take the mean of the last map or, of a ViT, its class token, .*: cls_avg"):
        find_classifier(Classification(encoder, 5, pool="cls_avg"), "timm")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"hidden": (6,)}, r"are one linear layer, this one has 4 layers \(task.hidden\)"),
        ({"pool": "flatten"}, "this one has task.pool: flatten"),
        ({"layer": 2}, "this one has task.layer: 2"),
    ],
)
def test_head_of_another_kind_says_why_it_has_no_counterpart(options: dict[str, Any], reason: str) -> None:
    task = make_classifier({"name": "resnet18"}, **options)
    with pytest.raises(ValueError, match=reason):
        find_classifier(task, "torchvision")


def test_folded_network_has_no_counterpart() -> None:
    network = Encoder({"name": "resnet18"}, 64)
    fold_encoder(network)
    assert "torchvision" in str(explain_missing_model_format(Classification(network, 5), "torchvision", False))


@pytest.mark.parametrize("name", TASKS)
def test_formats_that_exist_are_those_without_a_reason(name: str) -> None:
    task, _ = build_model(name)
    graphs = [explain_missing_model_format(task, format, True) for format in ("onnx", "torch_export")]
    assert explain_missing_model_format(task, "safetensors", True) is None
    assert all(graph is None for graph in graphs) == (name != "detect")
    assert explain_missing_model_format(task, "timm", True)


def test_padding_that_the_normalisation_leaves_out_is_no_graph() -> None:
    task, _ = build_model("segment", encoder={"normalize": "image"})
    assert "leaves the padding of views out" in str(explain_missing_model_format(task, "onnx", True))
    assert explain_missing_model_format(task, "onnx", False) is None


@pytest.mark.parametrize("name", ["classify_square", "segment"])
def test_exported_program_takes_any_number_of_images(name: str) -> None:
    task, _ = build_model(name)
    network = export_model_program(task).module()
    for count in (1, 3):
        images = torch.rand(count, 3, task.encoder.image_size, task.encoder.image_size)
        with torch.no_grad():
            torch.testing.assert_close(network(images), ModelGraph(task)(images), rtol=1e-4, atol=1e-5)
