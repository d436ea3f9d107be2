"""Every format of an encoder gives its features, as the code of the model card loads it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from firstlight.pipeline.data.manifest import file_sha256
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.report.cards import model_card
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.weights.weight_sources import find_weights
from tests.support.card_python import CardPython
from tests.support.exported_models import export_encoder
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def card_python() -> Iterator[CardPython]:
    python = CardPython("import torch\ntorch.set_num_threads(1)\n", {"PYTHONPATH": str(ROOT)})
    yield python
    python.close()


@pytest.mark.parametrize(
    ("encoder", "size", "formats"),
    [
        ({"name": "resnet18"}, 64, {"torchvision", "timm", "safetensors", "onnx", "torch_export"}),
        (
            {"name": "timm", "model": "resnet10t", "normalize": "image"},
            64,
            {"timm", "safetensors", "onnx", "torch_export"},
        ),
        ({"name": "convnet", "width": 4, "depth": 2, "input": "rgb_sobel"}, 8, {"safetensors", "onnx", "torch_export"}),
        (
            {"name": "timm", "model": "test_vit", "img_size": 32},
            32,
            {"timm", "safetensors", "onnx", "torch_export"},
        ),
        ({"name": "timm", "model": "test_efficientnet"}, 64, {"timm", "safetensors", "onnx", "torch_export"}),
    ],
    ids=["resnet18", "timm", "convnet", "vit", "efficientnet"],
)
def test_every_format_is_exported_and_the_card_code_runs(
    tmp_path: Path, digits: Store, card_python: CardPython, encoder: dict[str, Any], size: int, formats: set[str]
) -> None:
    instance, worker, made = export_encoder(tmp_path, digits, encoder, size)
    result, folder = instance.result, instance.folder / "export"
    assert result is not None
    assert set(result["formats"]) == {path.name for path in folder.iterdir() if path.is_dir()} == formats
    assert set(result["left_out"]) == {"torchvision", "timm"} - formats
    for format, facts in result["formats"].items():
        assert {test: found["images"] for test, found in facts["difference"].items()} == {
            "store": 8,
            "random 1": 1,
            "random 5": 5,
        }
        assert all(found["relative"] <= 1e-4 for found in facts["difference"].values())
        assert {name: file["sha256"] for name, file in facts["files"].items()} == {
            f.name: file_sha256(f) for f in (folder / format).iterdir()
        }
    text = model_card.write_card(worker, instance, [], [], {"encoder": "runs:/1"})
    assert text is not None
    assert model_card.write_card(worker, instance, [], [], {"encoder": "runs:/1"}) is None, (
        "the same card is not written again"
    )
    assert str(tmp_path) not in text
    assert digits.hash in text
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == len(formats)
    check_card_code(card_python, blocks, folder, made)


def check_card_code(card_python: CardPython, blocks: list[str], folder: Path, made: Encoder) -> None:
    """Runs the code blocks of a card in another process and compares their (2, C) features with the encoder's."""
    size = made.image_size
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(9))
    np.save(folder.parent / "x.npy", x.numpy())
    given = re.compile(r"^images = (numpy|torch).*$", re.M)
    loaded = "__import__('numpy').load('../x.npy')"
    load = {"numpy": f"images = {loaded}", "torch": f"images = torch.from_numpy({loaded})"}
    assert all(given.search(block) for block in blocks)
    for k, block in enumerate(blocks):
        code = given.sub(lambda match: load[match.group(1)], block)
        save = f"__import__('numpy').save('../found{k}.npy', __import__('numpy').asarray(features))\n"
        card_python.run(f"__import__('torch').set_grad_enabled(False)\n{code}\n{save}", folder)
    with torch.no_grad():
        own = made(x)[-1].mean((2, 3)).numpy()
    for k in range(len(blocks)):
        found = np.load(folder.parent / f"found{k}.npy")
        assert found.shape == own.shape
        assert np.abs(found - own).max() <= 1e-4 * np.abs(own).max()


def test_licence_of_existing_weights_is_in_every_format_that_has_a_place_for_it(tmp_path: Path, digits: Store) -> None:
    spec = {"name": "timm", "model": "test_resnet", "weights": "/w.pth", "licence": "cc-by-4.0"}
    instance, _, _ = export_encoder(tmp_path, digits, spec, 64, formats=["timm", "safetensors"], start="given")
    folder = instance.folder / "export"
    assert json.loads((folder / "timm/config.json").read_text())["pretrained_cfg"]["license"] == "cc-by-4.0"
    origin = json.loads((folder / "safetensors/encoder.json").read_text())["weights"]
    assert origin == {"source": "w.pth", "licence": "cc-by-4.0"}
    assert find_weights(str(folder), spec).licence == "cc-by-4.0"
    assert find_weights(str(folder / "timm"), spec).licence == "cc-by-4.0"
