"""A fine-tuned model is read as it was saved, or refused in one line; nothing is unpickled."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.artifacts.encoder_folder import load_encoder, save_encoder
from firstlight.pipeline.stages.prediction.saved_model import (
    Preprocessing,
    read_model,
    read_model_description,
)
from firstlight.pipeline.train.folder_manifest import write_file, write_manifest
from firstlight.tasks.downstream.task import Task
from firstlight.tasks.downstream.whole_images import ImageViews
from firstlight.tasks.nn.encoders import Encoder
from tests.support.saved_models import CLASSES, MODELS, save_small_model

FILES = ["encoder.json", "encoder.safetensors", "manifest.json", "task.json", "task.safetensors"]


def predict_noise(task: Task) -> list[dict[str, torch.Tensor]]:
    size = task.encoder.image_size
    noise = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(5))
    whole, plain = torch.tensor([[0.0, 0.0, size, size]]), torch.eye(2, 3, dtype=torch.float64)[None]
    with torch.inference_mode():
        return task.eval().predict_images([ImageViews(one[None], whole, plain, (size, size)) for one in noise])


def assert_same(own: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> None:
    for a, b in zip(own, other, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", MODELS)
def test_read_model_predicts_every_bit_as_the_saved_one(tmp_path: Path, name: str) -> None:
    task = save_small_model(tmp_path / "model", name)
    before = torch.get_rng_state()
    found = read_model(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers stay"
    assert not any(module.training for module in found.task.modules())
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == FILES
    assert found.classes == CLASSES
    assert found.target == task.target
    assert found.facts == {"arm": "scratch", "lr": 0.1, "labels": 3, "store": "s", "seed": 0}
    assert_same(predict_noise(task), predict_noise(found.task))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("classify", {"batch_norm": "fold"}),
        ("detect", {"encoder": {"name": "alexnet", "norm": "batch"}, "last_pool": "drop", "batch_norm": "fold"}),
        ("detect", {"pyramid": 8, "anchors": [8, 16]}),
        ("detect", {"proposals": "windows"}),
        ("segment", {"head": "fcn"}),
        ("classify", {"encoder": {"input": "rgb_sobel", "normalize": "image"}}),
    ],
)
def test_changed_networks_are_built_again(
    tmp_path: Path, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "encoder" in options and options["encoder"].get("name") == "alexnet":
        monkeypatch.setitem(MODELS, "detect", (MODELS["detect"][0], 64, MODELS["detect"][2]))
    task = save_small_model(tmp_path, name, **options)
    assert_same(predict_noise(task), predict_noise(read_model(tmp_path).task))


def test_folder_is_also_that_of_an_encoder(tmp_path: Path) -> None:
    task = save_small_model(tmp_path, "classify")
    own = task.encoder.state_dict()
    loaded = load_encoder(tmp_path, 8).state_dict()
    assert all(torch.equal(own[name], loaded[name]) for name in own)
    assert not any(name.startswith("encoder") for name in load_file(tmp_path / "task.safetensors")), "no tensor twice"


def test_encoder_that_has_lost_layers_is_refused_in_one_line(tmp_path: Path) -> None:
    save_small_model(tmp_path, "classify", batch_norm="fold")
    with pytest.raises(UserError, match=r"has lost layers in its fine-tuning \(batch_norm: fold\).*valid: ") as told:
        load_encoder(tmp_path, 8)
    assert "\n" not in str(told.value)


def test_encoder_alone_is_no_model(tmp_path: Path) -> None:
    save_encoder(Encoder({"name": "convnet", "width": 4, "depth": 2}, 8), tmp_path, {})
    with pytest.raises(UserError, match="an encoder without a task; valid: the folder `model` of a stage finetune"):
        read_model(tmp_path)


def test_missing_folder_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{tmp_path / 'none'}: is not a whole fine-tuned model: .*manifest.json"):
        read_model(tmp_path / "none")


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-1]), flip_bit])
def test_damaged_file_is_named_in_one_line(tmp_path: Path, file: str, damage: Any) -> None:
    save_small_model(tmp_path, "classify")
    damage(tmp_path / file)
    for read in (read_model, read_model_description):
        with pytest.raises(UserError, match=file) as told:
            read(tmp_path)
        assert "\n" not in str(told.value)


def rewrite(folder: Path, **files: Any) -> None:
    """Seals the folder again, with files that were changed: JSON by dotted keys, or tensors."""
    entries: dict[str, Any] = {}
    for name in FILES:
        if name == "manifest.json":
            continue
        data, change = (folder / name).read_bytes(), files.get(name.replace(".", "_"))
        if name.endswith(".json"):
            told = json.loads(data)
            for key, value in (change or {}).items():
                *path, last = key.split(".")
                here = told
                for part in path:
                    here = here[part]
                here[last] = value
            data = json.dumps(told).encode()
        elif change is not None:
            data = save({**load_file(folder / name), **change})
        entries |= write_file(folder, name, data)
    write_manifest(folder, entries)


HOSTILE: dict[str, dict[str, Any]] = {
    "another task": {"task_json": {"task.name": "segment"}},
    "an unknown task": {"task_json": {"task.name": "guess"}},
    "an unknown argument": {"task_json": {"task.weights": 3}},
    "a head of other widths": {"task_json": {"task.hidden": [7]}},
    "a head that fills the memory": {"task_json": {"task.hidden": [2**40]}},
    "a head that fills the memory by many layers": {"task_json": {"task.hidden": [1000] * 900}},
    "an encoder that fills the memory": {"encoder_json": {"spec.width": 2**40}},
    "a deeper encoder": {"encoder_json": {"spec.depth": 3}},
    "images that fill the memory": {"encoder_json": {"image_size": 2**16}},
    "more classes": {"task_json": {"classes": ["a", "b", "c", "d"]}},
    "no classes": {"task_json": {"classes": []}},
    "classes that are no texts": {"task_json": {"classes": [1, 2, 3]}},
    "an unknown format": {"task_json": {"format": 2}},
    "an unknown augmentation": {"task_json": {"preprocessing.views": [[{"op": "explode"}]]}},
    "views without a crop": {"task_json": {"preprocessing.views": [[{"op": "horizontal_flip"}]]}},
    "too many views": {"task_json": {"preprocessing.views": [[{"op": "center_crop"}]] * 2000}},
    "levels that are none": {"task_json": {"preprocessing.levels": {"16-bit grey": [0, 1e999]}}},
    "windows of classes": {"task_json": {"preprocessing.windows": {"scale": 0.5, "size": None}}},
    "batch normalisations that are not there": {"task_json": {"batch_norm": "fold"}},
    "weights that are no numbers": {"task_safetensors": {"head.0.weight": torch.full((6, 8), float("nan"))}},
    "weights that overflow": {"task_safetensors": {"head.0.weight": torch.full((6, 8), 3e38)}},
    "a head of another shape": {"task_safetensors": {"head.0.weight": torch.zeros(6, 9)}},
    "a tensor too many": {"task_safetensors": {"more": torch.zeros(2)}},
    "an encoder's tensor too many": {"encoder_safetensors": {"more": torch.zeros(2)}},
}


@pytest.mark.fault(47, "a fine-tuned model whose parts do not fit each other")
@pytest.mark.parametrize("kind", HOSTILE)
def test_parts_that_do_not_fit_are_one_line(tmp_path: Path, kind: str) -> None:
    save_small_model(tmp_path, "classify")
    rewrite(tmp_path)
    assert read_model(tmp_path).classes == CLASSES, "sealing again is no damage"
    rewrite(tmp_path, **HOSTILE[kind])
    with pytest.raises(UserError, match=rf"^{tmp_path}: is not a whole fine-tuned model: ") as told:
        read_model(tmp_path)
    assert "\n" not in str(told.value)


def test_windows_are_as_many_as_an_image_takes() -> None:
    seen = Preprocessing(8, (({"op": "center_crop"},),), {"scale": 0.5, "size": None})
    assert [len(seen.list_views(size)) for size in ((10, 10), (20, 10), (5, 50))] == [4, 8, 40]
    with pytest.raises(ValueError, match="needs 2000 windows; at most 1000"):
        seen.list_views((5, 2500))
    assert len(Preprocessing(8, (({"op": "center_crop"},),)).list_views((5, 2500))) == 1
