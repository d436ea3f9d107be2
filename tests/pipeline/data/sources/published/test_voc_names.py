"""Names of images in lists, as people write them."""

from pathlib import Path

import pytest

from firstlight.pipeline.data.sources.published.voc_names import ImageNames
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import list_labels
from tests.support.published_sets import get_refusal, open_set, write_jpegs
from tests.support.voc_folders import write_voc

NAMES = ("000001.jpg", "my cat 2.png", "a.b.jpeg", "img_0")
WITH_ENDINGS, ENDS, FIRST = "without their endings", "by the ends of their paths", "by the first word of a line"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_jpegs(tmp_path, *(f"JPEGImages/{name}" for name in NAMES if "." in name))


@pytest.mark.parametrize(
    ("line", "name", "how"),
    [
        ("000001", "000001", None),
        ("000001 -1", "000001", None),
        ("000001  1", "000001", None),
        ("my cat 2", "my cat 2", None),
        ("my cat 2  -1", "my cat 2", None),
        ("a.b", "a.b", None),
        ("000001.jpg", "000001", WITH_ENDINGS),
        ("my cat 2.png", "my cat 2", WITH_ENDINGS),
        ("my cat 2.png 1", "my cat 2", WITH_ENDINGS),
        ("JPEGImages/000001.jpg", "000001", ENDS),
        ("./JPEGImages/000001", "000001", ENDS),
        ("/home/me/data/VOC/JPEGImages/000001.jpg", "000001", ENDS),
        ("/mnt/x/pictures/my cat 2.png", "my cat 2", ENDS),
        ("C:\\data\\JPEGImages\\000001.jpg", "000001", ENDS),
        ("../VOCdevkit/VOC2007/JPEGImages/a.b.jpeg", "a.b", ENDS),
        ("JPEGImages/000001.jpg Annotations/000001.xml", "000001", FIRST),
        ("000001.jpg 000001.png", "000001", FIRST),
        ("000002", None, None),
        ("/etc/passwd", None, None),
        ("my cat", None, None),
    ],
)
def test_line_names_a_file_that_exists(root: Path, line: str, name: str | None, how: str | None) -> None:
    names, file = ImageNames(root), Path("train.txt")
    assert names.find_name(line, file) == name
    assert names.describe_names() == ([f"train.txt: 1 names were found {how} (1)"] if how else [])
    assert names.find_name(line) == name


def test_lists_in_other_words_are_read_and_reported(tmp_path: Path) -> None:
    lines = [f"/data/old place/JPEGImages/{k:06d}.jpg\n" for k in range(4)]
    root = write_voc(tmp_path, train="".join(lines), test="000004.jpg\r\n000005\r\n")
    source = open_set("voc", root)
    assert [path for path, _ in list_labels(source)] == [f"JPEGImages/{k:06d}.jpg" for k in range(4)]
    assert source.splits == {"train": 4, "test": 2}
    assert source.notes == (
        "train.txt: 4 names were found by the ends of their paths (4)",
        "test.txt: 2 names were found as VOC has them (1), without their endings (1)",
    )


def test_list_of_which_no_name_exists_is_named(tmp_path: Path) -> None:
    root = write_voc(tmp_path, train="cat one\ncat two\n", test="000004\n")
    file = root / "ImageSets/Main/train.txt"
    assert get_refusal("voc", root) == (
        f"{file}: none of its 2 names is an image in JPEGImages, which holds e.g. '000000.jpg'; "
        "valid: a name a line, without its ending"
    )
    with pytest.raises(UserError, match="none of its 9 names"):
        ImageNames(root).check_found(file, 9)


def test_text_of_several_words_is_one_name_if_a_file_is_called_so(root: Path) -> None:
    names = ImageNames(root)
    assert [names.is_one_name(text) for text in ("000001", "none", "my cat 2", "my cat 2.png", "000001 1")] == [
        True,
        True,
        True,
        True,
        False,
    ]
