"""The lists of PASCAL VOC: which list becomes which split."""

from pathlib import Path

import pytest

from tests.support.image_sources import list_labels, read_split
from tests.support.paths import SHARED_DATA
from tests.support.published_sets import get_refusal, open_set, write_jpegs
from tests.support.voc_folders import write_voc


def list_image_numbers(root: Path) -> tuple[list[int], list[int]]:
    source = open_set("voc", root)
    assert (source.classes, set(source.labels.tolist())) == ((), {-1})
    train, test = (
        [path for path, _ in list_labels(source, split)] if split in source.splits else []
        for split in ("train", "test")
    )
    return [int(Path(path).stem) for path in train], [int(Path(path).stem) for path in test]


@pytest.mark.parametrize("folder", ["ImageSets/Main", "ImageSets/Segmentation"])
@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        (
            {
                "trainval": "000000\n000001\n000002\n",
                "train": "000000\n000002\n",
                "val": "000001\n",
                "test": "000004\n",
            },
            ([0, 1, 2], [4]),
        ),
        ({"train": "000002\n", "val": "000001\n", "test": "000004\n"}, ([2, 1], [4])),  # as CamVid
        (
            {"trainval": "000000\n000001\n000002\n", "train": "000000\n000002\n", "val": "000001\n"},
            ([0, 2], [1]),
        ),  # as VOC 2012
        ({"trainval": "000000\n000001\n000002\n", "val": "000001\n"}, ([0, 2], [1])),
        ({"trainval": "000005\n000003\n"}, ([5, 3], [])),
        ({"train": "000003  1\n000001 -1\n\n"}, ([3, 1], [])),  # the lists of one class
    ],
)
def test_lists_define_splits(
    tmp_path: Path, folder: str, lists: dict[str, str], expected: tuple[list[int], list[int]]
) -> None:
    assert list_image_numbers(write_voc(tmp_path, folder, **lists)) == expected


def test_test_split_is_added_without_test_list(tmp_path: Path) -> None:
    source = open_set("voc", write_voc(tmp_path, trainval="".join(f"{k:06d}\n" for k in range(6))), test_fraction=0.5)
    assert source.splits == {"train": 3, "test": 3}


def test_year_folder_may_be_below_root(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOCdevkit" / "VOC2007", train="000001\n", test="000002\n")
    assert (
        list_image_numbers(tmp_path)
        == list_image_numbers(tmp_path / "VOCdevkit")
        == list_image_numbers(tmp_path / "VOCdevkit" / "VOC2007")
        == ([1], [2])
    )
    write_voc(tmp_path / "VOCdevkit" / "VOC2012", train="000003\n", val="000002\n")
    assert "holds VOC2007, VOC2012; valid: the folder of one of them" in get_refusal("voc", tmp_path)


def test_listed_image_may_have_any_suffix_or_be_missing(tmp_path: Path) -> None:
    root = write_jpegs(
        write_voc(tmp_path, train="a.b\n000009\n", test="c\n"), "JPEGImages/a.b.png", "JPEGImages/c.jpeg"
    )
    records = read_split(open_set("voc", root))
    assert [(record.path, record.reason) for record in records] == [
        ("JPEGImages/a.b.png", None),
        ("JPEGImages/000009.jpg", "No such file or directory"),
    ]
    assert list_labels(open_set("voc", root), "test") == [("JPEGImages/c.jpeg", -1)]


def test_invalid_lists_raise(tmp_path: Path) -> None:
    assert get_refusal("voc", tmp_path).endswith(f"JPEGImages' is missing; {str(tmp_path)!r} holds nothing")
    write_jpegs(tmp_path, "JPEGImages/1.jpg")
    assert "ImageSets/Main/trainval.txt' is missing" in get_refusal("voc", tmp_path)
    write_voc(tmp_path, train="000001\n000002\n", test="000002\n")
    assert "'JPEGImages/000002.jpg' is listed twice; valid: an image is in one split, once" in get_refusal(
        "voc", tmp_path
    )
    write_voc(tmp_path, train="\n", test="000002\n")
    assert "no image for training is listed" in get_refusal("voc", tmp_path)
    for path in ("../secret", "/etc/passwd", "a/../../b"):
        write_voc(tmp_path, train=f"000001\n{path}\n")
        file = tmp_path / "ImageSets/Main/train.txt"
        assert get_refusal("voc", tmp_path) == f"{file}: line 2: {path!r} is no path below dataset.root"


@pytest.mark.parametrize(("name", "train", "test"), [("bccd", 292, 72), ("camvid", 468, 233)])
def test_real_sets_have_known_splits(name: str, train: int, test: int) -> None:
    if not (SHARED_DATA / name).is_dir():
        pytest.skip(f"there is no {SHARED_DATA / name}")
    source = open_set("voc", SHARED_DATA / name)
    assert source.splits == {"train": train, "test": test}
    assert all(record.data for split in ("train", "test") for record in read_split(source, split))
