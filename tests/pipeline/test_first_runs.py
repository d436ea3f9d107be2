"""`fl.pretrain` and its kin, on a folder of images: a table, an encoder, and what is made from it."""

from pathlib import Path

import numpy as np
import pytest

import firstlight as fl
from firstlight.pipeline.errors import UserError
from tests.support.channel_images import write_band_folders
from tests.support.folders_of_noise import write_noise_folder

pytestmark = pytest.mark.usefixtures("undrawn_figures")


def test_later_runs_start_from_a_pretraining(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_noise_folder(tmp_path / "images", {"a": 12, "b": 12}, (40, 36))
    asked = {"method": "simclr", "epochs": 1, "model": "convnet"}
    first = fl.pretrain(tmp_path / "images", tmp_path / "out", "seeds=[1]", **asked)
    said = capfd.readouterr().err
    assert "network: convnet from random weights" in said
    assert "prepare: 24 images in" in said
    assert {row.stage for row in first.table} == {"evaluate"}
    assert first.report.exists()
    assert first.encoder.embed([next((tmp_path / "images").rglob("*.png"))]).shape[0] == 1
    assert fl.pretrain(tmp_path / "images", tmp_path / "out", "seeds=[1]", **asked, quiet=True).table == first.table
    assert capfd.readouterr() == ("", "")
    again = fl.evaluate(tmp_path / "images", tmp_path / "again", "seeds=[1]", weights=tmp_path / "out")
    mine = {row.measure: row.pretrained for row in first.table}
    # The same images and weights: the given ones score as the pretrained did.
    assert {row.measure.removesuffix(", given"): row.pretrained for row in again.table} == mine
    image = next((tmp_path / "images").rglob("*.png"))
    assert np.array_equal(again.encoder.embed([image]), first.encoder.embed([image])), "the weights that were given"
    nothing = fl.run(fl.load_recipe(tmp_path / "again" / "recipe.yaml"), only="prepare", quiet=True)
    with pytest.raises(
        UserError, match=r"^encoder: the run has none; valid: load_encoder with a reference or a folder"
    ):
        nothing.encoder  # noqa: B018
    embedded = fl.embed(tmp_path / "images", tmp_path / "embedded", weights=tmp_path / "out")
    assert embedded.table == ()
    (folder,) = (tmp_path / "embedded" / "embedded").glob("embed-seed0-*")
    assert fl.open_embeddings(folder)[0].shape == (24,)


def test_bands_are_pretrained_to_a_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images = write_band_folders(tmp_path / "bands", 12)
    found = fl.pretrain(images, tmp_path / "out", "seeds=[1]", epochs=1)
    said = capfd.readouterr().err
    assert "2 classes, 13 channels of 16 bits, 32 pixels on the shorter side" in said
    assert {row.stage for row in found.table} == {"evaluate"}
    assert found.encoder.embed([images / "field/000.tif"], bits=16).shape[0] == 1
    # A network that was pretrained on bands takes bands.
    embedded = fl.embed(images, tmp_path / "embedded", weights=tmp_path / "out", quiet=True)
    (folder,) = (tmp_path / "embedded" / "embedded").glob("embed-seed0-*")
    assert fl.open_embeddings(folder)[0].shape == (24,)
    assert embedded.table == ()


@pytest.mark.ray
def test_a_ray_that_the_process_has_joined_trains_and_stays(ray_local: None, tmp_path: Path) -> None:
    """The process has called `ray.init` before, as a notebook on the head of a cluster does."""
    import ray

    write_noise_folder(tmp_path / "images", {"a": 12, "b": 12}, (40, 36))
    job = ray.get_runtime_context().get_job_id()
    overrides = ("scale.workers=1", "seeds=[0]")
    result = fl.pretrain(
        *(tmp_path / "images", tmp_path / "out", *overrides), method="simclr", epochs=1, model="convnet", quiet=True
    )
    assert list(result.encoders) == [0]
    assert ray.is_initialized()
    assert ray.get_runtime_context().get_job_id() == job
    # The folder in which Ray Train keeps what it knows of its runs.
    assert list((tmp_path / "out" / "out" / ".ray").iterdir())


def test_unknown_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^pretrain: 'modell' is no argument; valid: model, weights, method, epochs"):
        fl.pretrain(tmp_path, tmp_path / "out", modell="resnet18")  # type: ignore[call-arg]
