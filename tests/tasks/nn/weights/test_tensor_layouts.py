from typing import Any

import pytest
import timm
import torch

from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.weights.tensor_layouts import fit_layouts, list_layouts

VIT: dict[str, Any] = {"name": "timm", "model": "test_vit", "img_size": 32, "patch_size": 8}


@pytest.mark.parametrize(
    ("spec", "libraries"),
    [
        ({"name": "convnet", "width": 4}, ["firstlight"]),
        ({"name": "resnet18"}, ["firstlight", "torchvision", "timm"]),
        ({"name": "resnet18", "norm": "group"}, ["firstlight"]),
        ({"name": "resnet18", "input": "rgb_sobel"}, ["firstlight"]),
        ({"name": "timm", "model": "mobilenetv3_small_050"}, ["firstlight", "timm"]),
        (VIT, ["firstlight", "timm"]),
    ],
)
def test_layouts_are_those_of_the_libraries_that_have_the_network(spec: dict[str, Any], libraries: list[str]) -> None:
    encoder = Encoder(spec, 32)
    layouts = list_layouts(encoder)
    assert [layout.library for layout in layouts] == libraries
    assert all(list(layout.names) == list(encoder.state_dict()) for layout in layouts)


@pytest.mark.parametrize("model", ["mobilenetv3_small_050", "test_vit", "swin_tiny_patch4_window7_224"])
def test_names_in_timm_are_those_of_its_network(model: str) -> None:
    size = 224 if "swin" in model else 160 if model == "test_vit" else 32
    layout = list_layouts(Encoder({"name": "timm", "model": model}, size))[-1]
    with torch.device("meta"):
        own = set(timm.create_model(model).state_dict())
    assert set(layout.names.values()) <= own
    assert len(set(layout.names.values())) == len(layout.names)


def test_layout_that_knows_most_names_is_taken() -> None:
    encoder = Encoder({"name": "resnet18"}, 32)
    own = {f"module.{name}": tensor for name, tensor in encoder.state_dict().items()}
    fitted = fit_layouts(encoder, own, "'w'")
    assert (fitted.layout.library, fitted.prefix.text, fitted.resampled) == ("firstlight", "module.", ())
    names = list_layouts(encoder)[1].names
    foreign = {f"module.{names[name]}": tensor for name, tensor in encoder.state_dict().items()}
    assert fit_layouts(encoder, foreign, "'w'").layout.library == "torchvision"
    with pytest.raises(ValueError, match=r"^'w' has no tensor of resnet18: the file has 'a', the network 'stages.0.0"):
        fit_layouts(encoder, {"a": torch.ones(1)}, "'w'")
