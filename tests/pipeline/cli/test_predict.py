"""`firstlight predict`: tables in pipes, files, exit codes, and mistakes in one line."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from firstlight.pipeline.cli.main import cli
from firstlight.pipeline.cli.predict import _print_to_pipe
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.prediction.answers import ImageClasses
from firstlight.pipeline.stages.prediction.predictor import FineTunedModel
from firstlight.pipeline.stages.prediction.saved_model import read_model
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.client import TrackingClient
from tests.support import recipes
from tests.support.saved_models import CLASSES, MODELS, save_small_model


def call_predict(*arguments: Any) -> Result:
    """Returns what the command printed; its exit code is the value that it returns."""
    words = ["predict", *map(str, arguments)]
    return CliRunner().invoke(cli, words, catch_exceptions=False, standalone_mode=False)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for k in range(3):
        file = tmp_path / f"photos/{k}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + k, 30, 3), np.uint8)).save(file)
    return tmp_path / "photos"


def test_table_and_file_have_what_the_model_predicts(tmp_path: Path, photos: Path) -> None:
    save_small_model(tmp_path / "model", "classify")
    ran = call_predict(tmp_path / "model", photos, "--out", tmp_path / "p.parquet", "--top", 2)
    assert ran.return_value == 0, ran.output
    expected = FineTunedModel(read_model(tmp_path / "model")).predict(sorted(photos.iterdir()))
    lines = ran.stdout.strip().split("\n")
    rows = pq.read_table(tmp_path / "p.parquet").to_pylist()
    for k, (line, row, answer) in enumerate(zip(lines, rows, expected, strict=True)):
        assert isinstance(answer, ImageClasses)
        named = [f"{name} {100 * share:.1f} %" for name, share in answer.rank_classes(2)]
        assert line.split("\t") == [f"{photos}/{k}.png", *named]
        assert row["path"] == f"{photos}/{k}.png"
        assert np.array_equal(np.array(row["probabilities"], np.float32), answer.probabilities)
    assert "predict: 3 images in " in ran.stderr
    assert f"3 images: {tmp_path}/p.parquet" in ran.stderr


def test_unreadable_images_are_listed_and_the_exit_code_says_so(tmp_path: Path, photos: Path) -> None:
    save_small_model(tmp_path / "model", "classify")
    (photos / "1.png").write_text("no image")
    ran = call_predict(tmp_path / "model", photos, "--out", tmp_path / "p.parquet")
    assert ran.return_value == 1
    assert len(ran.stdout.strip().split("\n")) == 2
    assert f"not used: {photos}/1.png: is not a readable image" in ran.stderr
    assert f"1 image cannot be used: {tmp_path}/p-quarantine.parquet" in ran.stderr
    assert pq.read_table(tmp_path / "p-quarantine.parquet").column("path").to_pylist() == [f"{photos}/1.png"]


def test_masks_have_the_size_of_their_images_and_boxes_their_pixels(tmp_path: Path, photos: Path) -> None:
    save_small_model(tmp_path / "segment", "segment")
    save_small_model(tmp_path / "detect", "detect")
    assert call_predict(tmp_path / "segment", photos, "--out", tmp_path / "masks").return_value == 0
    for k in range(3):
        with Image.open(tmp_path / f"masks/masks/{k}.png") as mask:
            assert mask.size == (30, 20 + k)
            assert int(np.asarray(mask).max()) < len(CLASSES)
    assert call_predict(tmp_path / "detect", photos, "--out", tmp_path / "boxes.json").return_value == 0
    told = json.loads((tmp_path / "boxes.json").read_text())
    assert [(image["width"], image["height"]) for image in told["images"]] == [(30, 20), (30, 21), (30, 22)]
    assert told["annotations"]
    for one in told["annotations"]:
        x, y, width, height = one["bbox"]
        image = told["images"][one["image_id"]]
        assert 0 <= x <= x + width <= image["width"] + 1e-9
        assert 0 <= y <= y + height <= image["height"] + 1e-9


def test_model_is_taken_from_its_run_and_from_the_registry(tmp_path: Path, photos: Path) -> None:
    save_small_model(tmp_path / "model", "classify")
    tracking = TrackingClient(recipes.recipe(tmp_path / "runs"))
    run_id = tracking.start_run("tuned seed 0", tmp_path / "mlflow.json", {}, {"firstlight.kind": "finetune"})
    instance = StageInstance("tuned", 0, "f", tmp_path)
    tracking.log_encoder(run_id, tmp_path / "model", instance, "animals", "model")
    tables = []
    for k, reference in enumerate((tmp_path / "model", f"runs:/{run_id[:8]}/model", "models:/animals@current")):
        out = tmp_path / f"{k}.parquet"
        ran = call_predict(reference, photos, "--out", out, "--from", f"storage={tmp_path / 'runs'}")
        assert ran.return_value == 0, ran.output
        tables.append(pq.read_table(out).replace_schema_metadata(None))
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])


def test_store_is_predicted_by_split(tmp_path: Path, digits: Store) -> None:
    save_small_model(tmp_path / "model", "classify")
    out = tmp_path / "p.parquet"
    assert call_predict(tmp_path / "model", digits.path, "--split", "test", "--out", out).return_value == 0
    assert pq.read_table(out).column("id").to_pylist() == digits.ids("test").tolist()


def test_mistakes_are_one_line(tmp_path: Path, photos: Path) -> None:
    save_small_model(tmp_path / "model", "classify")
    (tmp_path / "old.parquet").write_text("x")
    for arguments, message in (
        ((tmp_path / "none", photos), "MODEL: .*none' is no folder; valid: the folder `model`"),
        ((photos, photos), "is not a whole fine-tuned model"),
        (("models:/none@current", photos), "tracking.uri: "),
        ((tmp_path / "model", tmp_path / "none"), "PATHS: .* does not exist"),
        ((tmp_path / "model", photos, "--out", tmp_path / "old.parquet"), "--out: .* exists"),
        ((tmp_path / "model", photos, "--workers", 500), "scale.workers: 500"),
    ):
        with pytest.raises(UserError, match=message) as told:
            call_predict(*arguments, "--from", f"storage={tmp_path / 'runs'}")
        assert "\n" not in str(told.value)


def test_closed_pipe_is_no_failure_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as broken:
        monkeypatch.setattr("sys.stdout", broken)
        assert not _print_to_pipe("x")
        assert _print_to_pipe("x"), "the rest goes nowhere"


@pytest.mark.ray
def test_workers_on_ray_write_the_same_file(tmp_path: Path, digits: Store, ray_local: None) -> None:
    assert "classify" in MODELS
    save_small_model(tmp_path / "model", "classify")
    tables = []
    for workers in (0, 2):
        out = tmp_path / f"{workers}.parquet"
        ran = call_predict(tmp_path / "model", digits.path, "--split", "test", "--out", out, "--workers", workers)
        assert ran.return_value == 0, ran.output
        tables.append(pq.read_table(out))
    assert tables[0].equals(tables[1])
