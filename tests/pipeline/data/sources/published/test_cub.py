"""CUB-200: four tables joined by the number of the image."""

from pathlib import Path

import pytest

from tests.support.image_sources import list_labels, read_split
from tests.support.published_sets import get_refusal, open_set, write_jpegs, write_texts

PATHS = ("001.Albatross/A_1.jpg", "002.Auklet/B_7.jpg", "002.Auklet/B_3.jpg")
TABLES = {
    "images": "".join(f"{k} {path}\n" for k, path in enumerate(PATHS, 1)),
    "image_class_labels": "1 1\n3 2\n2 2\n",
    "train_test_split": "1 1\n2 0\n3 1\n",
    "classes": "1 001.Albatross\n2 002.Auklet\n",
}


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    write_jpegs(tmp_path / "CUB_200_2011" / "images", *PATHS)
    write_texts(tmp_path / "CUB_200_2011", **TABLES)
    return tmp_path


def test_tables_are_joined_by_image_number(cub: Path) -> None:
    source = open_set("cub200", cub)
    assert (source.classes, source.splits) == (("001.Albatross", "002.Auklet"), {"train": 2, "test": 1})
    assert list_labels(source) == [(f"images/{PATHS[0]}", 0), (f"images/{PATHS[2]}", 1)]
    assert list_labels(source, "test") == [(f"images/{PATHS[1]}", 1)]
    assert read_split(source)[1].data == (cub / "CUB_200_2011" / "images" / PATHS[2]).read_bytes()
    assert open_set("cub200", cub / "CUB_200_2011").fingerprint == source.fingerprint
    (cub / "CUB_200_2011" / "images" / PATHS[0]).unlink()
    assert open_set("cub200", cub).fingerprint != source.fingerprint
    assert read_split(open_set("cub200", cub))[0].reason == "No such file or directory"


@pytest.mark.parametrize(
    ("table", "content", "message"),
    [
        ("image_class_labels", "1 1\n2 3\n3 2\n", "line 2: '3' is out of range; valid: 1 to 2"),
        ("image_class_labels", "1 1\n3 2\n", "has no line for image 2 of images.txt"),
        ("train_test_split", "1 1\n2 0\n3 yes\n", "line 3: 'yes' is out of range; valid: 0 to 1"),
        ("train_test_split", "1 1\n1 0\n3 1\n", "line 2: '1 0' is not a new number and a value"),
        ("images", "1 001.Albatross/A_1.jpg\n2 ../../x.jpg\n", "line 2: '../../x.jpg' is no path below dataset.root"),
        ("classes", "one Albatross\n", "line 1: 'one Albatross' is not a new number and a value"),
    ],
)
def test_invalid_table_names_line(cub: Path, table: str, content: str, message: str) -> None:
    write_texts(cub / "CUB_200_2011", **{table: content})
    assert get_refusal("cub200", cub) == f"{cub / 'CUB_200_2011' / table}.txt: {message}"


def test_missing_file_and_empty_split_raise(cub: Path) -> None:
    write_texts(cub / "CUB_200_2011", train_test_split="1 0\n2 0\n3 0\n")
    assert "no image for training is listed" in get_refusal("cub200", cub)
    (cub / "CUB_200_2011" / "classes.txt").unlink()
    assert "classes.txt' is missing; " in get_refusal("cub200", cub)
