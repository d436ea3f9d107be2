"""Every format of a whole model gives its logits, as the code of its card loads it."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.report.cards.fine_tuned_card import write_exported_card
from firstlight.pipeline.stages.prediction.saved_model import read_model
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.tasks.downstream.task import Task
from tests.support.card_python import CardPython
from tests.support.exported_models import export_model
from tests.support.saved_models import CLASSES, MODELS, save_small_model

# Ops of the views of small models, with every key.
WHOLE_OPS = {"center_crop": {"op": "center_crop", "scale": None, "size": None}, "fit": {"op": "fit"}}


@dataclass(frozen=True)
class Exported:
    """A small model, the stage that exported it, and its card."""

    task: Task
    instance: StageInstance
    text: str


def export(folder: Path, digits: Store, name: str, size: int, options: dict[str, Any]) -> Exported:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, name, (MODELS[name][0], size, MODELS[name][2]))
        task = save_small_model(folder / "model", name, **options)
    worker, instance = export_model(folder, digits, folder / "model", size)
    text = write_exported_card(worker, instance, [], [], {})
    assert text is not None
    return Exported(task, instance, text)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory, digits: Store) -> Exported:
    options = {"encoder": {"name": "resnet18"}, "hidden": []}
    return export(tmp_path_factory.mktemp("resnet"), digits, "classify", 64, options)


@pytest.fixture(scope="module")
def card_python() -> Iterator[CardPython]:
    python = CardPython()
    yield python
    python.close()


def test_classifier_is_exported_in_all_formats(resnet: Exported) -> None:
    check_export(resnet, "classify", 64, {"torchvision", "timm", "safetensors", "onnx", "torch_export"})


@pytest.mark.parametrize(
    ("name", "size", "formats"),
    [
        ("multilabel", 8, {"safetensors", "onnx", "torch_export"}),
        ("segment", 16, {"safetensors", "onnx", "torch_export"}),
        ("detect", 32, {"safetensors"}),
    ],
)
def test_whole_model_is_exported_in_the_formats_that_it_has(
    tmp_path: Path, digits: Store, name: str, size: int, formats: set[str]
) -> None:
    check_export(export(tmp_path, digits, name, size, {}), name, size, formats)


def check_export(exported: Exported, name: str, size: int, formats: set[str]) -> None:
    result, folder = exported.instance.result, exported.instance.folder / "export"
    assert result is not None
    assert result["what"] == "model"
    assert set(result["formats"]) == {path.name for path in folder.iterdir() if path.is_dir()} == formats
    for facts in result["formats"].values():
        assert all(found["relative"] <= 1e-4 for found in facts["difference"].values())
        assert set(facts["difference"]) == {"store", "random 1", "random 5"}
    assert len(re.findall(r"```python", exported.text)) == len(formats)
    if name != "detect":
        session = onnxruntime.InferenceSession(folder / "onnx/model.onnx")
        told = session.get_modelmeta().custom_metadata_map
        assert json.loads(told["classes"]) == list(CLASSES)
        assert json.loads(told["views"]) == [[WHOLE_OPS[op["op"]] for op in MODELS[name][2]]]
        images = torch.rand(3, 3, size, size)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            own = exported.task.compute_logits(images)  # type: ignore[operator]
        assert logits.shape == own.shape
        assert np.allclose(logits, own.numpy(), atol=1e-4 * float(own.abs().max()))
    assert read_model(folder / "safetensors").classes == CLASSES


@pytest.mark.parametrize("format", ["torchvision", "timm"])
def test_code_of_a_library_gives_the_logits_of_the_model(
    tmp_path: Path, resnet: Exported, card_python: CardPython, format: str
) -> None:
    assert resnet.instance.result is not None
    blocks = re.findall(r"```python\n(.*?)```", resnet.text, re.S)
    code = dict(zip(resnet.instance.result["formats"], blocks, strict=True))[format]
    assert f"import {format}" in code
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(9))
    np.save(tmp_path / "x.npy", images.numpy())
    given = re.sub(
        r"^images = .*$",
        f"images = torch.from_numpy(__import__('numpy').load({str(tmp_path / 'x.npy')!r}))",
        code,
        flags=re.M,
    )
    save = f"\n__import__('numpy').save({str(tmp_path / 'found.npy')!r}, logits.numpy())\n"
    card_python.run(given + save, resnet.instance.folder / "export")
    with torch.no_grad():
        own = resnet.task.compute_logits(images).numpy()  # type: ignore[operator]
    assert np.abs(np.load(tmp_path / "found.npy") - own).max() <= 1e-4 * np.abs(own).max()
