"""`firstlight look` on folders whose copies and leaks are known: its lines, its page and its lists."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from firstlight.pipeline.data.prepare import header_probe
from firstlight.pipeline.data.prepare import prepare as prepare_module
from firstlight.pipeline.data.sources import open_source
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.look.look import LookRequest, look_at_images
from firstlight.pipeline.starter import survey
from firstlight.pipeline.starter.survey import survey_images
from firstlight.pipeline.terminal import SafeConsole
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
    # That of every page, which sorts tables and enlarges pictures.
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


def test_source_is_listed_once_and_no_header_is_read(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = list[object]()
    monkeypatch.setattr(prepare_module, "open_source", lambda options: opened.append(options) or open_source(options))
    monkeypatch.setattr(header_probe, "iterate_headers", lambda *arguments: pytest.fail("a header was read"))
    monkeypatch.setattr(survey, "open_source", lambda options: pytest.fail("the source was listed twice"))
    look_at_images(LookRequest(images, tmp_path / "out"), QUIET, lambda line: None)
    assert len(opened) == 1


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


def test_images_are_limited_and_it_is_said(images: Path, tmp_path: Path) -> None:
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
