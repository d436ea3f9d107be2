"""A format that a network cannot have is told in one line, before any work."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.runner import run_recipe
from tests.support import recipes
from tests.support.exported_models import export_recipe

QUIET = Console(quiet=True)


@pytest.mark.parametrize(
    ("encoder", "size", "format", "message"),
    [
        (
            {"name": "alexnet"},
            64,
            "torchvision",
            "torchvision has no network like encoder.name: alexnet; valid: safetensors, onnx, torch_export",
        ),
        ({"name": "resnet18", "stem": "cifar"}, 32, "timm", "encoder.stem: cifar; valid: safetensors"),
        ({"name": "resnet18", "norm": "group"}, 64, "torchvision", "encoder.norm: group; valid: safetensors"),
        (
            {"name": "timm", "model": "resnet10t"},
            64,
            "torchvision",
            "it is 'resnet10t' of timm; valid: timm, safetensors, onnx, torch_export",
        ),
    ],
)
def test_unavailable_format_is_one_line_before_any_work(
    tmp_path: Path, encoder: dict[str, Any], size: int, format: str, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        run_recipe(export_recipe(tmp_path, encoder, size, formats=["onnx", format]), QUIET)
    assert str(caught.value).startswith(f"stages.export.formats: '{format}' is not valid: ")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "stores").exists()


@pytest.mark.parametrize(
    ("task", "format", "message"),
    [
        ({"name": "classify", "hidden": [4]}, "timm", "'timm' is not valid: the libraries' heads are one linear layer"),
        (
            {"name": "classify_square"},
            "torchvision",
            "classifiers that give logits; valid: safetensors, onnx, torch_export",
        ),
    ],
)
def test_format_that_a_model_will_not_have_is_one_line_before_any_work(
    tmp_path: Path, task: dict[str, Any], format: str, message: str
) -> None:
    raw = recipes.recipe(tmp_path, stages__finetune__task=task, stages__finetune__arms=["scratch"]).dump()
    stages = {"finetune": raw["stages"]["finetune"], "export": {"kind": "export", "what": "model", "formats": [format]}}
    with pytest.raises(UserError) as caught:
        run_recipe(parse_recipe({**raw, "stages": stages}), QUIET)
    assert str(caught.value).startswith(f"stages.export.formats: '{format}' is not valid: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "stores").exists()
