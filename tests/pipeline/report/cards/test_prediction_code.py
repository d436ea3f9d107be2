"""The code of a card predicts as the model does; for ONNX with Pillow, numpy and onnxruntime alone."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.augment.ops import list_ten_crops
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.report.cards.prediction_code import (
    describe_view_code,
    model_prediction_code,
    onnx_prediction_code,
)
from firstlight.pipeline.stages.prediction.answers import ImageClasses
from firstlight.pipeline.stages.prediction.predictor import FineTunedModel
from firstlight.pipeline.stages.prediction.saved_model import Preprocessing, read_model
from tests.support.card_python import CardPython
from tests.support.exported_models import WITHOUT_TORCH, export_model
from tests.support.saved_models import MODELS, save_small_model

CASES: dict[str, tuple[str, Any]] = {
    "whole square": ("classify", (({"op": "center_crop"},),)),
    "share": ("classify", (({"op": "center_crop", "scale": 0.8},),)),
    "pixels": ("classify_square", (({"op": "center_crop", "size": 9},),)),
    "copied pixels": ("multilabel", (({"op": "center_crop", "size": 8},),)),
    "padded": ("multilabel", (({"op": "fit"},),)),
    "ten crops": ("classify", list_ten_crops(0.7)),
}


def write_photograph(file: Path) -> None:
    """Writes a coloured image that is not square and lies on its side, as phones write them."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).resize((61, 37), Image.Resampling.BICUBIC).save(file, quality=95, exif=exif)


@pytest.fixture(scope="module")
def python_without_torch() -> Iterator[CardPython]:
    python = CardPython(WITHOUT_TORCH)
    yield python
    python.close()


@pytest.mark.parametrize("case", CASES)
def test_code_for_onnx_predicts_the_same_without_torch_and_without_firstlight(
    tmp_path: Path, digits: Store, python_without_torch: CardPython, case: str
) -> None:
    name, views = CASES[case]
    save_small_model(tmp_path / "model", name, seen={"views": views})
    _, instance = export_model(tmp_path, digits, tmp_path / "model", 8, formats=["onnx"])
    folder = instance.folder / "export"
    write_photograph(folder / "image.jpg")
    model = FineTunedModel(read_model(tmp_path / "model"))
    (answer,) = model.predict([folder / "image.jpg"])
    assert isinstance(answer, ImageClasses)
    printed = python_without_torch.run(onnx_prediction_code(name, model.preprocessing), folder)
    found = {line.partition(": ")[0]: float(line.partition(": ")[2].rstrip("%")) for line in printed.splitlines()}
    assert found == pytest.approx({k: 100 * p for k, p in answer.rank_classes(5)}, abs=0.06)
    assert len(set(found.values())) > 1


def test_code_for_masks_tells_the_shares_of_the_view(
    tmp_path: Path, digits: Store, python_without_torch: CardPython
) -> None:
    save_small_model(tmp_path / "model", "segment", seen={"views": (({"op": "center_crop"},),)})
    _, instance = export_model(tmp_path, digits, tmp_path / "model", 16, formats=["onnx"])
    folder = instance.folder / "export"
    # A square of the size of a view: the shares of the view are those of the image.
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(
        folder / "image.jpg", quality=100
    )
    model = FineTunedModel(read_model(tmp_path / "model"))
    (answer,) = model.predict([folder / "image.jpg"])
    printed = python_without_torch.run(onnx_prediction_code("segment", model.preprocessing), folder)
    found = dict(re.findall(r"(\w+): ([\d.]+)% of the pixels", printed))
    assert {k: float(share) for k, share in found.items()} == pytest.approx(
        {k: 100 * share for k, share in answer.rank_classes(3)}, abs=0.06
    )


@pytest.mark.parametrize("op", ["random_crop", "random_resized_crop", "window_crop"])
def test_views_that_are_drawn_have_no_code_but_are_named(op: str) -> None:
    assert describe_view_code(({"op": op},) for _ in range(1)) is None  # type: ignore[arg-type]
    code = onnx_prediction_code("classify", Preprocessing(8, (({"op": op},),)))
    assert op in code
    assert "PIL" not in compile(code, "card", "exec").co_names


@pytest.mark.parametrize("task", MODELS)
@pytest.mark.parametrize("format", ["torchvision", "timm", "safetensors", "onnx", "torch_export"])
def test_code_of_every_format_compiles(task: str, format: str) -> None:
    facts = {"model": "resnet18", "classes": 3, "head": "fc"}
    code = model_prediction_code(format, facts, task, Preprocessing(8, (({"op": "fit"},),)), "x = images")
    assert compile(code, "card", "exec").co_names
    assert ("x = images" in code) == (format in ("torchvision", "timm"))


def test_code_for_timm_loads_the_folder_by_its_name_where_it_can() -> None:
    facts = {"model": "test_vit", "classes": 3, "head": "head", "options": {"img_size": 8, "global_pool": "avg"}}
    view = Preprocessing(8, (({"op": "fit"},),))
    code = model_prediction_code("timm", facts, "classify", view, "x = images")
    assert "timm.create_model(\"test_vit\", img_size=8, global_pool='avg', num_classes=3)" in code
    code = model_prediction_code("timm", {**facts, "files": {"config.json": {}}}, "classify", view, "x = images")
    assert 'timm.create_model("local-dir:timm", pretrained=True)' in code
    assert "load_file" not in code
