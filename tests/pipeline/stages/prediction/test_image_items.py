"""The images that a command line names are found, and decoded as those of a store are; odd ones say what is wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from firstlight.pipeline.data.images import BadImage
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.prediction.image_items import (
    FileImages,
    GivenImages,
    StoreImages,
    convert_tensor_pixels,
    find_images,
    open_image_file,
)
from firstlight.pipeline.stages.prediction.saved_model import Preprocessing

SEEN = Preprocessing(8, (({"op": "center_crop"},),), max_pixels=10_000)


def write_image(path: Path, value: int = 100, size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)
    return path


def test_folders_patterns_and_files_are_listed_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.jpg", "b/deep/3.png", "c.png"):
        write_image(tmp_path / name)
    (tmp_path / "b/notes.txt").write_text("x")
    (tmp_path / "b/.hidden.png").write_bytes(b"x")
    inside = [f"{tmp_path}/b/{name}" for name in ("1.jpg", "2.png", "deep/3.png")]
    assert find_images([f"{tmp_path}/b"]) == FileImages(tuple(inside))
    assert find_images([f"{tmp_path}/c.png", f"{tmp_path}/b/*.png", f"{tmp_path}/b"]) == FileImages(
        (f"{tmp_path}/c.png", inside[1], inside[0], inside[2])
    )
    assert find_images([f"{tmp_path}/*"]) == FileImages((*inside, f"{tmp_path}/c.png"))


def test_a_name_with_brackets_is_a_file_first(tmp_path: Path) -> None:
    file = write_image(tmp_path / "a[1].png")
    assert find_images([str(file)]) == FileImages((str(file),))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.jpg", "PATHS: '{}/none.jpg' does not exist; valid: images, folders"),
        ("*.jpg", "PATHS: no file matches '{}/\\*.jpg'"),
        ("empty", "PATHS: no images \\(.*\\) in '{}/empty'"),
    ],
)
def test_path_that_names_nothing_is_a_one_line_error(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message.format(tmp_path)) as told:
        find_images([f"{tmp_path}/{path}"])
    assert "\n" not in str(told.value)


def test_store_is_asked_about_by_split_and_alone(tmp_path: Path, digits: Store) -> None:
    whole, test = find_images([str(digits.path)]), find_images([str(digits.path)], "test")
    assert isinstance(whole, StoreImages)
    assert isinstance(test, StoreImages)
    assert len(whole) == sum(digits.splits.values())
    assert np.array_equal(test.ids, digits.ids("test"))
    assert test.name_images([0, 2]) == digits.read_paths(digits.ids("test")[[0, 2]])
    with pytest.raises(UserError, match=r"--split: 'day' is not in .*; valid: train, test"):
        find_images([str(digits.path)], "day")
    with pytest.raises(UserError, match="is a store; valid: one store"):
        find_images([str(digits.path), str(digits.path)])
    with pytest.raises(UserError, match="--split: 'test' is valid with a store only"):
        find_images([str(write_image(tmp_path / "a.png"))], "test")


def test_broken_images_say_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(write_image(tmp_path / "a.png", size=(64, 64)).read_bytes()[:60])
    large = write_image(tmp_path / "large.png", size=(200, 200))
    for name, reason in (("cut.png", "."), ("gone.png", "cannot be read: No such file"), (large.name, "larger than")):
        with pytest.raises(BadImage, match=reason):
            open_image_file(tmp_path / name, SEEN)


def test_deep_images_are_read_with_the_levels_that_the_model_has_learned(tmp_path: Path) -> None:
    file = tmp_path / "deep.png"
    Image.fromarray(np.full((4, 4), 2048, np.uint16)).save(file)
    learned = Preprocessing(8, SEEN.views, levels={"16-bit grey": (0.0, 4095.0)})
    assert open_image_file(file, learned).getpixel((0, 0)) == (128, 128, 128)
    with pytest.raises(BadImage, match="would be nearly black"):
        open_image_file(file, SEEN)
    items = GivenImages([Image.open(file)])
    assert items.open_image(0, learned).getpixel((0, 0)) == (128, 128, 128)
    with pytest.raises(BadImage, match="would be nearly black"):
        items.open_image(0, SEEN)


def test_given_images_of_any_kind_have_the_same_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    given = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), pixels, tensor, tensor / 255]
    items = GivenImages(given)
    for position in range(len(items)):
        assert np.array_equal(np.asarray(items.open_image(position, SEEN)), pixels)
    assert items.name_images([0, 3]) == [f"{tmp_path}/a.png", "images[3]"]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (torch.zeros(4, 2, 2), "a tensor of shape"),
        (torch.full((3, 2, 2), 2.0), "values outside of 0..1"),
        (np.zeros((2, 2, 3), np.complex64), "."),
        (3, "."),
    ],
)
def test_input_that_is_no_image_is_refused(image: object, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        GivenImages([image]).open_image(0, SEEN)  # type: ignore[list-item]


def test_grey_tensor_is_a_grey_image() -> None:
    assert convert_tensor_pixels(torch.ones(1, 2, 3)).tolist() == [[255] * 3] * 2
