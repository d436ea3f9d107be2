"""Views of a model are the pixels of a training's evaluation, with their places in the images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from firstlight.pipeline.data.loader import Loader
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.prediction.image_items import FileImages, StoreImages
from firstlight.pipeline.stages.prediction.saved_model import Preprocessing
from firstlight.pipeline.stages.prediction.view_batches import (
    REFUSED_KEY,
    ViewBatches,
    pack_arrays,
    unpack_arrays,
    unpack_refused,
)

OPS = (({"op": "random_crop", "scale": 0.7}, {"op": "horizontal_flip"}), ({"op": "fit"},))


def test_pixels_are_those_of_the_loader_of_a_training_bit_for_bit(digits: Store) -> None:
    ids = digits.ids("test")[:13]
    expected = Loader(digits, OPS, 8, 0, 10**6).load_once(ids)["views"]
    batches = ViewBatches(StoreImages(digits, ids), Preprocessing(8, OPS), 5)
    assert batches.num_batches == 3
    found = [unpack_arrays(batches.load_pixels(k)) for k in range(3)]
    assert np.array_equal(np.concatenate([one["pixels"] for one in found]).reshape(13, 2, 8, 8, 3), expected)
    assert np.concatenate([one["position"] for one in found]).tolist() == list(range(13))
    assert all(one["count"].tolist() == [2] * len(one["position"]) for one in found)


def test_images_that_cannot_be_used_are_listed_and_the_others_loaded(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("nothing")
    paths = (str(tmp_path / "bad.png"), str(tmp_path / "good.png"), str(tmp_path / "gone.png"))
    found = unpack_arrays(ViewBatches(FileImages(paths), Preprocessing(8, (OPS[1],)), 3).load_pixels(0))
    assert found["position"].tolist() == [1]
    assert found["size"].tolist() == [[20, 10]]
    assert found["region"].tolist() == [[0.0, 2.0, 8.0, 6.0]]
    assert found["to_view"][0] @ np.array([20, 10, 1]) == pytest.approx([8, 6])
    (first, _), (third, reason) = unpack_refused(found[REFUSED_KEY])
    assert (first, third) == (0, 2)
    assert reason.startswith("cannot be read")


def test_batch_without_a_usable_image_is_empty(tmp_path: Path) -> None:
    found = unpack_arrays(ViewBatches(FileImages(("none",)), Preprocessing(8, OPS), 4).load_pixels(0))
    assert found["pixels"].shape == (0, 8, 8, 3)
    assert found["to_view"].shape == (0, 2, 3)


def test_windows_are_as_many_as_each_image_takes(tmp_path: Path) -> None:
    for name, size in (("a", (20, 10)), ("b", (10, 10))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    seen = Preprocessing(8, (OPS[1],), {"scale": 1.0, "size": None})
    items = FileImages((str(tmp_path / "a.png"), str(tmp_path / "b.png")))
    assert unpack_arrays(ViewBatches(items, seen, 2).load_pixels(0))["count"].tolist() == [2, 1]


def test_arrays_survive_the_way_to_the_network() -> None:
    arrays = {"a": np.arange(6.0).reshape(2, 3).T, "b/0": np.empty((0, 4), np.float32), "c": np.array([-1])}
    found = unpack_arrays(pack_arrays(arrays))
    assert all(
        np.array_equal(found[name], array) and found[name].dtype == array.dtype for name, array in arrays.items()
    )
    assert torch.from_numpy(pack_arrays(arrays).copy()).dtype == torch.uint8
