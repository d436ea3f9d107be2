"""The code of a model card is Python, and normalises images as the encoder does."""

from typing import Any

import pytest
import torch

from firstlight.pipeline.report.cards.loading_code import loading_code, normalisation_code
from firstlight.tasks.nn.export_formats import NORMED_SOURCE


@pytest.mark.parametrize(
    ("format", "facts"),
    [
        ("torchvision", {"model": "resnet18", "place": "layer4", "turned": True}),
        ("timm", {"model": "vit_tiny_patch16_224", "place": "forward_features"}),
        ("timm", {"model": "vit_tiny_patch16_224", "place": "blocks"}),
        ("safetensors", {}),
        ("onnx", {}),
        ("torch_export", {}),
    ],
)
def test_code_of_every_format_compiles_and_computes_features(format: str, facts: dict[str, Any]) -> None:
    code = loading_code(format, facts, 32, "x = images")
    assert "features" in compile(code, "card", "exec").co_names
    assert ("x = images" in code) == (format in ("torchvision", "timm")), "graphs contain the normalisation"


def test_normalisation_by_image_gives_zero_mean_and_unit_deviation() -> None:
    names: dict[str, Any] = {"torch": torch, "images": torch.rand(2, 3, 8, 8)}
    exec(normalisation_code({"normalize": "image"}), names)
    assert names["x"].mean((1, 2, 3)).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert names["x"].std((1, 2, 3)).tolist() == pytest.approx([1.0, 1.0])


def test_fixed_normalisation_uses_mean_and_deviation_of_the_encoder() -> None:
    names: dict[str, Any] = {"torch": torch, "images": torch.ones(1, 3, 2, 2)}
    exec(normalisation_code({"normalize": "fixed", "mean": (0.5, 0.0, 1.0), "std": (0.5, 2.0, 1.0)}), names)
    assert names["x"][0, :, 0, 0].tolist() == pytest.approx([1.0, 0.5, 0.0])


def test_code_for_a_vit_normalises_its_last_map() -> None:
    facts = {"model": "test_vit", "options": {"img_size": 32}, "place": NORMED_SOURCE}
    code = loading_code("timm", facts, 32, "x = images")
    assert 'timm.create_model("test_vit", img_size=32)' in code
    assert "norm=True" in code
    assert "norm=True" not in loading_code("timm", {**facts, "place": "forward_intermediates"}, 32, "x = images")


def test_code_for_a_folder_of_maps_takes_the_last() -> None:
    facts = {"model": "m", "files": {"config.json": {}}, "place": "", "gives_maps": True, "channels_last": False}
    assert "map = net(x)[-1]\n" in loading_code("timm", facts, 32, "x = images")
    code = loading_code("timm", {**facts, "channels_last": True}, 32, "x = images")
    assert "map = net(x)[-1].permute(0, 3, 1, 2)" in code
    assert 'create_model("local-dir:timm", pretrained=True)' in code
