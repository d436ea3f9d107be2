"""VOC's layout: which lists become which split. Annotations: test_voc_annotations.py."""

from pathlib import Path

import pytest

from tests.support.paths import SHARED
from tests.support.published import jpegs, opened, refusal, texts
from tests.support.tiny import everything, summary

SHARED_DATA = SHARED / "data"


def voc(root: Path, folder: str = "ImageSets/Main", **lists: str) -> Path:
    jpegs(root, *(f"JPEGImages/{k:06d}.jpg" for k in range(6)))
    return texts(root, **{f"{folder}/{name}".replace("/", "__"): content for name, content in lists.items()})


def numbers(root: Path) -> tuple[list[int], list[int]]:
    source = opened("voc", root)
    assert (source.classes, set(source.labels.tolist())) == ((), {-1})
    train, test = (
        [path for path, _ in summary(source, split)] if split in source.splits else [] for split in ("train", "test")
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
def test_splits(tmp_path: Path, folder: str, lists: dict[str, str], expected: tuple[list[int], list[int]]) -> None:
    assert numbers(voc(tmp_path, folder, **lists)) == expected


def test_a_test_split_is_carved_out_where_none_is_listed(tmp_path: Path) -> None:
    source = opened("voc", voc(tmp_path, trainval="".join(f"{k:06d}\n" for k in range(6))), test_fraction=0.5)
    assert source.splits == {"train": 3, "test": 3}


def test_the_folder_may_lie_below(tmp_path: Path) -> None:
    voc(tmp_path / "VOCdevkit" / "VOC2007", train="000001\n", test="000002\n")
    assert (
        numbers(tmp_path)
        == numbers(tmp_path / "VOCdevkit")
        == numbers(tmp_path / "VOCdevkit" / "VOC2007")
        == ([1], [2])
    )
    voc(tmp_path / "VOCdevkit" / "VOC2012", train="000003\n", val="000002\n")
    assert "holds VOC2007, VOC2012; valid: the folder of one of them" in refusal("voc", tmp_path)


def test_images_of_other_kinds_and_images_that_lack(tmp_path: Path) -> None:
    root = jpegs(voc(tmp_path, train="a.b\n000009\n", test="c\n"), "JPEGImages/a.b.png", "JPEGImages/c.jpeg")
    records = everything(opened("voc", root))
    assert [(record.path, record.reason) for record in records] == [
        ("JPEGImages/a.b.png", None),
        ("JPEGImages/000009.jpg", "No such file or directory"),
    ]
    assert summary(opened("voc", root), "test") == [("JPEGImages/c.jpeg", -1)]


def test_what_is_refused(tmp_path: Path) -> None:
    assert refusal("voc", tmp_path).endswith(f"JPEGImages' is missing; {str(tmp_path)!r} holds nothing")
    jpegs(tmp_path, "JPEGImages/1.jpg")
    assert "ImageSets/Main/trainval.txt' is missing" in refusal("voc", tmp_path)
    voc(tmp_path, train="000001\n000002\n", test="000002\n")
    assert "'JPEGImages/000002.jpg' is listed twice; valid: an image is in one split, once" in refusal("voc", tmp_path)
    voc(tmp_path, train="\n", test="000002\n")
    assert "no image for training is listed" in refusal("voc", tmp_path)
    for path in ("../secret", "/etc/passwd", "a/../../b"):
        voc(tmp_path, train=f"000001\n{path}\n")
        file = tmp_path / "ImageSets/Main/train.txt"
        assert refusal("voc", tmp_path) == f"{file}: line 2: {path!r} is no path below dataset.root"


@pytest.mark.parametrize(("name", "train", "test"), [("bccd", 292, 72), ("camvid", 468, 233)])
def test_real_sets(name: str, train: int, test: int) -> None:
    if not (SHARED_DATA / name).is_dir():
        pytest.skip(f"there is no {SHARED_DATA / name}")
    source = opened("voc", SHARED_DATA / name)
    assert source.splits == {"train": train, "test": test}
    assert all(record.data for split in ("train", "test") for record in everything(source, split))
