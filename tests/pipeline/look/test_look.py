"""`firstlight look` on folders whose copies and leaks are known: its lines, its page and its lists."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from firstlight.pipeline.data.images import read_header
from firstlight.pipeline.data.prepare import prepare as prepare_module
from firstlight.pipeline.data.prepare import shared_format
from firstlight.pipeline.data.sources import open_source
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.look import look
from firstlight.pipeline.look.look import LookRequest, look_at_images
from firstlight.pipeline.starter import survey
from firstlight.pipeline.starter.survey import survey_images
from firstlight.pipeline.terminal import SafeConsole
from tests.support.channel_images import draw_bands, encode_bands, encode_pages, write_band_folders
from tests.support.dicom_files import encode_dicom
from tests.support.finetunings import save_seen_encoder
from tests.support.folders_of_noise import write_noise_folder

QUIET = SafeConsole(quiet=True)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten images of two classes to train on and four to test on: one has a brighter copy, one is in test, too."""
    root = tmp_path / "photo <s>"
    for split, count in (("train", 5), ("test", 2)):
        # The seed of the noise is the number of classes, so the splits would be equal with the same classes alone.
        extra = {"c": 1} if split == "test" else {}
        write_noise_folder(root / split, {"a": count, "b": count, **extra}, (24, 24))
    with Image.open(root / "train/a/0.png") as image:
        image.point(lambda value: value // 2 + 40).save(root / "train/b/copy.png")
    with Image.open(root / "train/b/1.png") as image:
        image.resize((48, 48), Image.Resampling.NEAREST).save(root / "test/b/copy.png")
    (root / "train/c").mkdir()
    Image.new("RGB", (20, 20), (1, 2, 200)).save(root / "train/c/flat.png")
    return root


def read_rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_copies_and_leaks_are_found_listed_and_shown(images: Path, tmp_path: Path) -> None:
    told = list[str]()
    page = look_at_images(LookRequest(images, tmp_path / "out", diverse=3), QUIET, told.append)
    assert told[0] == "images: 12 train, 6 test; 0 cannot be decoded"
    assert (
        told[2] == "near duplicates: 2 pairs with a cosine of 0.97 or more, 1 of them between train and another split"
    )
    pairs = {
        tuple(sorted(Path(row[key]).relative_to(images).as_posix() for key in ("path", "near")))
        for row in read_rows(page.parent / "near_duplicates.csv")
    }
    assert pairs == {("train/a/0.png", "train/b/copy.png"), ("test/b/copy.png", "train/b/1.png")}
    unique = {Path(row["path"]).relative_to(images).as_posix() for row in read_rows(page.parent / "unique.csv")}
    every = {path.relative_to(images).as_posix() for path in (images / "train").rglob("*.png")}
    gone = every - unique
    assert len(gone) == 2
    assert "train/b/1.png" in gone
    assert gone <= {"train/b/1.png", "train/a/0.png", "train/b/copy.png"}
    text = page.read_text("utf-8")
    assert "photo &lt;s&gt;" in text
    assert "photo <s>" not in text
    assert "http" not in text.replace("http-equiv", "")
    # The only script is that of every page, which sorts tables and enlarges pictures.
    assert text.count("<script") <= 1
    assert text.count("data:image/jpeg") >= 18


def test_images_are_written_for_other_programs(images: Path, tmp_path: Path) -> None:
    told = list[str]()
    asked = LookRequest(images, tmp_path / "out", export=("fiftyone", "embedding-atlas", "fiftyone"))
    look_at_images(asked, QUIET, told.append)
    assert [line.split(": ")[0] for line in told[-2:]] == ["fiftyone", "embedding-atlas"]
    samples = json.loads((tmp_path / "out/fiftyone/samples.json").read_text())["samples"]
    assert {Path(sample["filepath"]).relative_to(images) for sample in samples} == {
        path.relative_to(images) for path in images.rglob("*.png")
    }
    assert (tmp_path / "out/embedding_atlas.parquet").exists()
    with pytest.raises(UserError, match=r"^--export: 'atlas' is unknown; valid: embedding-atlas, fiftyone$"):
        look_at_images(LookRequest(images, tmp_path / "out", export=("atlas",)), QUIET, print)


def test_source_is_listed_once_and_one_header_of_colours_is_read(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, read = list[object](), list[bytes]()
    monkeypatch.setattr(look, "open_source", lambda options: opened.append(options) or open_source(options))
    monkeypatch.setattr(prepare_module, "open_source", lambda options: pytest.fail("the source was listed twice"))
    monkeypatch.setattr(survey, "open_source", lambda options: pytest.fail("the source was listed twice"))
    monkeypatch.setattr(shared_format, "read_header", lambda data: read.append(data) or read_header(data))
    look_at_images(LookRequest(images, tmp_path / "out"), QUIET, lambda line: None)
    assert (len(opened), len(read)) == (1, 1)


def test_folder_without_training_images_is_refused(images: Path, tmp_path: Path) -> None:
    (images / "train").rename(images / "val")
    with pytest.raises(UserError, match=r"train"):
        look_at_images(LookRequest(images, tmp_path / "out"), QUIET, print)


def test_lists_are_taken_by_a_recipe(images: Path, tmp_path: Path) -> None:
    page = look_at_images(LookRequest(images, tmp_path / "out", diverse=4), QUIET, lambda line: None)
    survey = survey_images(page.parent / "unique.csv")
    assert (survey.num_train + survey.num_test, survey.classes) == (10, ("a", "b", "c"))
    diverse = survey_images(page.parent / "diverse.csv")
    assert diverse.num_train + diverse.num_test == 4
    for row in read_rows(page.parent / "diverse.csv"):
        assert Path(row["path"]).parent.name == row["label"]


def test_page_limits_the_images_and_says_so(images: Path, tmp_path: Path) -> None:
    told = list[str]()
    look_at_images(LookRequest(images, tmp_path / "out", images=6), QUIET, told.append)
    assert told[0] == "images: 12 train, 6 test; 6 of them were compared; 0 cannot be decoded"


@pytest.mark.usefixtures("blank_figures")
def test_a_network_gives_the_features(images: Path, tmp_path: Path) -> None:
    _, encoder = save_seen_encoder(
        tmp_path / "trained",
        {
            "name": "convnet",
            "input": "rgb",
            "norm": "batch",
            "width": 4,
            "depth": 2,
            "mean": [0.5] * 3,
            "std": [0.25] * 3,
        },
    )
    told = list[str]()
    page = look_at_images(
        LookRequest(images, tmp_path / "out", similarity=0.9999, weights=str(encoder)), QUIET, told.append
    )
    assert told[0].startswith("images: 12 train, 6 test")
    assert f"a network with the weights {encoder}" in page.read_text("utf-8")
    assert (page.parent / "recipe.yaml").exists()


def test_a_model_alone_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--model: needs --weights; valid: both, or neither, and pixels are compared"):
        look_at_images(LookRequest(images, tmp_path / "out", model="resnet18"), QUIET, print)
    with pytest.raises(UserError, match="does not exist; valid: a folder of images"):
        look_at_images(LookRequest(tmp_path / "none", tmp_path / "out"), QUIET, print)


def test_bands_are_looked_at_with_all_their_channels(tmp_path: Path) -> None:
    root = write_band_folders(tmp_path / "bands", 8)
    twice = draw_bands(3, kind=0).repeat(2, 0).repeat(2, 1)
    (root / "water/copy.tif").write_bytes(encode_bands((twice * 0.9).astype(np.uint16)))
    told = list[str]()
    asked = LookRequest(root, tmp_path / "out", diverse=3, export=("embedding-atlas", "fiftyone"))
    page = look_at_images(asked, QUIET, told.append)
    assert told[0] == "images: 17 train; each has 13 channels of 16 bits; 0 cannot be decoded"
    (pair,) = read_rows(page.parent / "near_duplicates.csv")
    assert {Path(pair[key]).relative_to(root).as_posix() for key in ("path", "near")} == {
        "field/003.tif",
        "water/copy.tif",
    }
    text = page.read_text("utf-8")
    assert "pixels of 13 channels at 16 x 16" in text
    assert "pictures: channels 1 to 3 of 13, each from its 2nd to its 98th percentile." in text
    assert text.count("data:image/jpeg") >= 17
    assert survey_images(page.parent / "diverse.csv").dataset["channels"] == 13
    assert pq.read_table(tmp_path / "out/embedding_atlas.parquet").num_rows == 17
    samples = json.loads((tmp_path / "out/fiftyone/samples.json").read_text())["samples"]
    for sample in samples:
        assert Path(sample["original"]).suffix == ".tif"
        with Image.open(tmp_path / "out/fiftyone" / sample["filepath"]) as picture:
            assert picture.format == "JPEG", "no viewer shows thirteen channels"


@pytest.mark.parametrize(("kind", "channels"), [("pages", "5 channels"), ("scans", "1 channel")])
def test_pages_and_scans_are_looked_at(tmp_path: Path, kind: str, channels: str) -> None:
    (tmp_path / kind).mkdir()
    for k in range(6):
        bands = draw_bands(k, 5)
        data = encode_pages(bands) if kind == "pages" else encode_dicom(bands[:, :, 0].astype(np.int16), Modality="CT")
        (tmp_path / kind / f"{k}{'.tif' if kind == 'pages' else ''}").write_bytes(data)
    told = list[str]()
    look_at_images(LookRequest(tmp_path / kind, tmp_path / "out"), QUIET, told.append)
    assert told[0] == f"images: 6 train; each has {channels} of 16 bits; 0 cannot be decoded"


@pytest.mark.parametrize("weights", ["timm", "trained"])
def test_weights_for_colours_are_refused_for_bands(tmp_path: Path, weights: str) -> None:
    root = write_band_folders(tmp_path / "bands", 3)
    if weights == "trained":
        spec = {"name": "convnet", "norm": "batch", "width": 4, "depth": 2, "mean": [0.5] * 3, "std": [0.25] * 3}
        save_seen_encoder(tmp_path / "trained", spec)
        weights = str(tmp_path / "trained/encoder")
    with pytest.raises(UserError, match=r"its network takes 3 channels, and the images have 13 channels of 16 bits; "):
        look_at_images(LookRequest(root, tmp_path / "out", model="resnet18", weights=weights), QUIET, print)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("blank_figures")
def test_a_network_of_the_same_channels_gives_the_features(tmp_path: Path) -> None:
    spec = {"name": "convnet", "norm": "batch", "width": 4, "depth": 2, "channels": 13}
    _, encoder = save_seen_encoder(tmp_path / "trained", {**spec, "mean": [0.5] * 13, "std": [0.25] * 13})
    root, told = write_band_folders(tmp_path / "bands", 4), list[str]()
    look_at_images(LookRequest(root, tmp_path / "out", weights=str(encoder)), QUIET, told.append)
    assert told[0].startswith("images: 6 train, 2 test; each has 13 channels of 16 bits")


def test_images_that_none_can_read_end_in_the_first_one_s_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    for split in ("train", "test"):
        (tmp_path / "scans" / split).mkdir(parents=True)
        for k in range(3):
            (tmp_path / "scans" / split / f"{k}.dcm").write_bytes(encode_dicom(draw_bands(k, 1)[:, :, 0]))
    needed = (
        r"^.*scans: none of 3 images that were tried can be read; the first, train/0\.dcm: is DICOM, which needs an "
        r"extra: pip install 'firstlight\[dicom\]'$"
    )
    with pytest.raises(UserError, match=needed):
        look_at_images(LookRequest(tmp_path / "scans", tmp_path / "out"), QUIET, print)
