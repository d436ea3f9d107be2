"""The facts of images that a first recipe is made from."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.starter.survey import survey_images
from tests.support.channel_images import draw_bands, encode_pages, write_band_folders
from tests.support.dicom_files import encode_dicom
from tests.support.folders_of_noise import write_noise_folder

UNREADABLE = "is not a readable image (JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM, AVIF, JPEG2000)"


def test_folder_of_classes_is_known_by_its_counts_sizes_and_colours(tmp_path: Path) -> None:
    write_noise_folder(tmp_path / "train", {"cat": 5, "dog": 3}, (40, 60))
    write_noise_folder(tmp_path / "test", {"cat": 2, "dog": 2}, (40, 60))
    found = survey_images(tmp_path)
    assert found.dataset == {"name": "folder", "root": str(tmp_path)}
    assert (found.num_train, found.num_test, found.classes, found.class_images) == (8, 4, ("cat", "dog"), 3)
    assert (found.side, found.is_grey) == (40, False)


def test_flat_folder_has_no_classes_and_the_median_side(tmp_path: Path) -> None:
    for k, side in enumerate((10, *[20] * 9, 90)):
        Image.fromarray(np.full((side, 100, 3), k, np.uint8)).save(tmp_path / f"{k}.png")
    found = survey_images(tmp_path)
    assert (found.classes, found.class_images) == ((), 0)
    assert found.num_train + found.num_test == 11
    assert found.side == 20


def test_grey_images_are_seen(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_noise_folder(tmp_path / split, {"a": 4, "b": 4}, (16, 16), mode="L")
    assert survey_images(tmp_path).is_grey
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "train" / "a" / "colour.png")
    assert not survey_images(tmp_path).is_grey


def test_list_is_read_as_a_list(tmp_path: Path) -> None:
    write_noise_folder(tmp_path / "images", {"a": 4, "b": 4}, (16, 16))
    lines = [f"images/{name}/{k}.png,{name}" for name in "ab" for k in range(4)]
    (tmp_path / "all.csv").write_text("path,label\n" + "\n".join(lines))
    found = survey_images(tmp_path / "all.csv")
    assert found.dataset == {"name": "list", "list": str(tmp_path / "all.csv")}
    assert found.classes == ("a", "b")


def test_image_that_cannot_be_read_is_left_to_prepare(tmp_path: Path) -> None:
    write_noise_folder(tmp_path, {"a": 4, "b": 4}, (16, 16))
    (tmp_path / "a" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert survey_images(tmp_path).side == 16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "does not exist; valid: a folder of images, or a file that lists them"),
        ("notes.txt", "is no list of images; valid: a folder, or a file of .csv, .tsv, .jsonl, .ndjson, .parquet"),
        ("broken", f"none of 3 images that were tried can be read; the first, train/0.png: {UNREADABLE}"),
        ("one", f"none of 1 image that was tried can be read; the first, train/0.png: {UNREADABLE}"),
    ],
)
def test_mistake_is_one_line_that_names_the_place(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for folder, count in (("broken/train", 3), ("broken/test", 1), ("one/train", 1), ("one/test", 1)):
        (tmp_path / folder).mkdir(parents=True)
        for k in range(count):
            (tmp_path / folder / f"{k}.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(UserError) as caught:
        survey_images(tmp_path / name)
    assert str(caught.value) == f"{tmp_path / name}: {message}"


def test_bands_are_known_by_the_format_of_their_files(tmp_path: Path) -> None:
    found = survey_images(write_band_folders(tmp_path, 6, side=24))
    assert found.dataset == {"name": "folder", "root": str(tmp_path), "channels": 13, "bits": 16}
    assert (found.side, found.is_grey, str(found.shared)) == (24, False, "13 channels of 16 bits")


def test_pages_and_scans_are_channels(tmp_path: Path) -> None:
    for name in ("pages", "scans"):
        (tmp_path / name).mkdir()
    for k in range(6):
        (tmp_path / "pages" / f"{k}.tif").write_bytes(encode_pages(draw_bands(k, 4)))
        (tmp_path / "scans" / f"{k}.dcm").write_bytes(encode_dicom(draw_bands(k, 1)[:, :, 0]))
    assert survey_images(tmp_path / "pages").dataset["channels"] == 4
    assert survey_images(tmp_path / "scans").dataset["channels"] == 1


def test_images_of_another_format_are_reported(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_band_folders(tmp_path / split, 6)
    (tmp_path / "train/field/000.tif").write_bytes(b"II*\0junk")
    assert str(survey_images(tmp_path).shared) == "13 channels of 16 bits in 11 of 12 that were tried"
