"""Predictions are those of the network on the views of its stage, in this process and on Ray."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from firstlight.pipeline.data.loader import Loader
from firstlight.pipeline.data.ray_data import ActorPool, TaskPool
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.prediction.answers import ImageClasses, ImageMask, ImageObjects
from firstlight.pipeline.stages.prediction.image_items import FileImages, StoreImages
from firstlight.pipeline.stages.prediction.predictor import FineTunedModel, predict_items
from firstlight.pipeline.stages.prediction.saved_model import read_model
from firstlight.pipeline.train.training_job import to_batch
from firstlight.tasks.downstream.classify import Classification
from tests.support.saved_models import CLASSES, MODELS, save_small_model

TWO_VIEWS = (
    ({"op": "corner_crop", "corner": "top_left"},),
    ({"op": "center_crop"}, {"op": "horizontal_flip", "p": 1.0}),
)


def test_probabilities_are_those_of_the_mean_logits_of_all_views(tmp_path: Path, digits: Store) -> None:
    task = save_small_model(tmp_path, "classify", seen={"views": TWO_VIEWS})
    assert isinstance(task, Classification)
    ids = digits.ids("test")[:7]
    batch = to_batch(Loader(digits, TWO_VIEWS, 8, 0, 10**6).load_once(ids), torch.device("cpu"))
    with torch.inference_mode():
        expected = task.mean_logits(batch).softmax(1)
    found = list(predict_items(StoreImages(digits, ids), read_model(tmp_path), batch_size=7))
    assert [item.position for item in found] == list(range(7))
    for item, row in zip(found, expected, strict=True):
        assert isinstance(item.answer, ImageClasses)
        assert np.array_equal(item.answer.probabilities, row.numpy())
        assert item.answer.names == CLASSES


@pytest.mark.parametrize("name", MODELS)
def test_batches_of_any_size_give_the_same_answers(tmp_path: Path, name: str) -> None:
    save_small_model(tmp_path / "m", name)
    rng, paths = np.random.default_rng(0), []
    for k, size in enumerate([(40, 30), (30, 40), (9, 50), (33, 33), (20, 31)]):
        paths.append(str(tmp_path / f"{k}.png"))
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(paths[-1])
    (tmp_path / "2.png").write_text("no image")
    items, model = FileImages(tuple(paths)), read_model(tmp_path / "m")
    whole, single = (list(predict_items(items, model, batch_size=size)) for size in (5, 1))
    for k, (a, b) in enumerate(zip(whole, single, strict=True)):
        assert (a.position, a.size, a.reason) == (b.position, b.size, b.reason)
        assert (a.answer is None) == (k == 2)
        if isinstance(a.answer, ImageClasses):
            assert isinstance(b.answer, ImageClasses)
            assert a.answer.probabilities == pytest.approx(b.answer.probabilities, abs=1e-6)
        if isinstance(a.answer, ImageMask):
            assert isinstance(b.answer, ImageMask)
            assert a.size is not None
            assert a.answer.mask.shape == a.size[::-1]
            assert (a.answer.mask == b.answer.mask).mean() > 0.999
        if isinstance(a.answer, ImageObjects):
            assert isinstance(b.answer, ImageObjects)
            assert a.answer.boxes == pytest.approx(b.answer.boxes, abs=1e-3)


def test_model_in_python_takes_paths_and_images_and_names_what_it_cannot_use(tmp_path: Path) -> None:
    save_small_model(tmp_path / "m", "multilabel")
    model = FineTunedModel(read_model(tmp_path / "m"))
    Image.new("RGB", (9, 9), (10, 200, 30)).save(tmp_path / "a.png")
    a, b = model.predict([tmp_path / "a.png", Image.open(tmp_path / "a.png")])
    assert isinstance(a, ImageClasses)
    assert isinstance(b, ImageClasses)
    assert np.array_equal(a.probabilities, b.probabilities)
    assert (model.classes, model.task) == (CLASSES, "multilabel")
    assert model.predict([]) == []
    (tmp_path / "bad.png").write_text("x")
    with pytest.raises(UserError, match=rf"^{tmp_path}/bad.png: cannot be used: is not a readable image"):
        model.predict([tmp_path / "a.png", tmp_path / "bad.png"])


@pytest.mark.ray
@pytest.mark.parametrize("name", ["classify", "segment"])
def test_two_actors_on_ray_give_the_same_bits_as_this_process(
    tmp_path: Path, digits: Store, ray_local: None, name: str
) -> None:
    save_small_model(tmp_path, name)
    items, model = StoreImages(digits, digits.ids("test")[:37]), read_model(tmp_path)
    pool = ActorPool(2, 0.5, 0.0, TaskPool(2, 0.25))
    own = list(predict_items(items, model, batch_size=8))
    there = list(predict_items(items, model, batch_size=8, folder=tmp_path, pool=pool))
    assert [item.position for item in there] == list(range(37))
    for a, b in zip(own, there, strict=True):
        if isinstance(a.answer, ImageClasses) and isinstance(b.answer, ImageClasses):
            assert np.array_equal(a.answer.probabilities, b.answer.probabilities)
        else:
            assert isinstance(a.answer, ImageMask)
            assert isinstance(b.answer, ImageMask)
            assert np.array_equal(a.answer.mask, b.answer.mask)


@pytest.mark.ray
def test_broken_file_is_listed_on_ray_too(tmp_path: Path, ray_local: None) -> None:
    save_small_model(tmp_path / "m", "classify")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("x")
    items = FileImages((str(tmp_path / "a.png"), str(tmp_path / "b.png")))
    pool = ActorPool(1, 0.5, 0.0, TaskPool(1, 0.25))
    good, bad = predict_items(items, read_model(tmp_path / "m"), batch_size=1, folder=tmp_path / "m", pool=pool)
    assert good.answer is not None
    assert bad.answer is None
    assert str(bad.reason).startswith("is not a readable image")
