"""The code of a model card is Python, and normalises images as the encoder does."""

from typing import Any

import pytest
import torch

from firstlight.pipeline.report.cards.loading_code import loading_code, normalisation_code


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
