"""An encoder of Firstlight on disk is found by its folder, or by that of the run that made it."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from firstlight.pipeline.data.channels.pixel_format import PixelFormat
from firstlight.pipeline.data.prepare.shared_format import SharedFormat
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.starter.choices import Wishes, choose_settings
from firstlight.pipeline.starter.own_encoder import find_own_encoder
from firstlight.pipeline.starter.survey import ImageSurvey
from tests.support.finetunings import save_seen_encoder

SPEC = {"name": "convnet", "input": "gray", "norm": "batch", "width": 4, "depth": 2}
SURVEY = ImageSurvey({"name": "folder", "root": "/data"}, 720, 240, tuple("abc"), 60, 224, False)


def save(out: Path, stage: str, seed: int, at: int, width: int = 4) -> Path:
    _, folder = save_seen_encoder(out / "mine" / f"{stage}-seed{seed}-abc", {**SPEC, "width": width})
    os.utime(folder / "encoder.json", (at, at))
    return folder


def test_first_seed_of_the_newest_pretraining_of_a_run_is_found(tmp_path: Path) -> None:
    for seed in (0, 2, 10):
        save(tmp_path, "first", seed, 100)
    wanted = save(tmp_path, "second", 2, 200, width=6)
    save(tmp_path, "second", 10, 300)
    found = find_own_encoder(str(tmp_path))
    assert found == find_own_encoder(str(wanted))
    assert found is not None
    assert found.section["weights"] == str(wanted.resolve())
    assert (found.section["width"], found.image_size) == (6, 8)


def test_other_texts_are_no_encoder_of_firstlight(tmp_path: Path) -> None:
    for text in ("timm", "hf-hub:owner/name", "models:/name@current", str(tmp_path), str(tmp_path / "none.pth")):
        assert find_own_encoder(text) is None


def test_damaged_encoder_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, "pretrain", 0, 100)
    (folder / "encoder.json").write_text("{")
    with pytest.raises(UserError, match=r"is not a whole encoder"):
        find_own_encoder(str(tmp_path))


def test_its_network_and_image_size_are_taken(tmp_path: Path) -> None:
    folder = save(tmp_path, "pretrain", 0, 100)
    chosen = choose_settings(SURVEY, Wishes(weights=str(tmp_path), goal="evaluate"), False)
    assert chosen.image_size == 8
    assert chosen.encoder == {**find_own_encoder(str(folder)).section}  # type: ignore[union-attr]
    assert chosen.pretrain is None
    assert chosen.reasons[1] == "size: 8 x 8 pixels, as the network had them"
    assert chosen.reasons[3:] == ("method: none, the weights are taken as they came", "stage: evaluate, 3 seeds")


def test_encoder_of_the_same_channels_is_taken_as_it_is(tmp_path: Path) -> None:
    bands = replace(SURVEY, shared=SharedFormat(PixelFormat(13, 16), 20, 20, 60))
    spec = {**SPEC, "input": "rgb", "channels": 13, "mean": [0.1] * 13, "std": [0.2] * 13}
    _, folder = save_seen_encoder(tmp_path / "bands" / "mine" / "pretrain-seed0-abc", spec)
    own = find_own_encoder(str(tmp_path / "bands"))
    assert own is not None
    assert own.channels == 13
    wishes = Wishes(weights=str(tmp_path / "bands"), goal="evaluate")
    chosen = choose_settings(bands, wishes, False)
    assert chosen.encoder == own.section
    assert chosen.reasons[2] == f"network: convnet from {folder.resolve()}"
    for other, images in ((SURVEY, "colours; valid: weights of 3 channels"), (grey(bands), "1 channel of 16 bits; ")):
        with pytest.raises(UserError, match=rf"^--weights: .* is of images with 13 channels, and these are {images}"):
            choose_settings(other, wishes, False)


def grey(survey: ImageSurvey) -> ImageSurvey:
    return replace(survey, shared=SharedFormat(PixelFormat(1, 16), 20, 20, 60))


def test_encoder_of_colours_has_no_normalisation_for_channels(tmp_path: Path) -> None:
    bands = replace(SURVEY, shared=SharedFormat(PixelFormat(13, 16), 20, 20, 60))
    spec = {**SPEC, "input": "rgb", "mean": [0.5] * 3, "std": [0.2] * 3}
    _, folder = save_seen_encoder(tmp_path, spec)
    chosen = choose_settings(bands, Wishes(weights=str(folder), goal="evaluate"), False)
    assert not {"mean", "std"} & chosen.encoder.keys()
    assert "mean and std, 13 numbers each, must be stated" in chosen.reasons[2]
    assert find_own_encoder(str(folder)).section["mean"] == [0.5] * 3  # type: ignore[union-attr]
