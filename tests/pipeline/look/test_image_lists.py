"""Lists of images: paths that exist, labels by name, and images without a path left out."""

import csv
from pathlib import Path

import numpy as np

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.look.findings import ImagePair
from firstlight.pipeline.look.image_lists import ImageLister
from tests.support.finetunings import start_arm


def read_rows(file: Path) -> list[list[str]]:
    with file.open(newline="") as lines:
        return list(csv.reader(lines))


def test_images_that_stand_in_a_file_with_others_are_left_out(tmp_path: Path, digits: Store) -> None:
    context, *_ = start_arm(tmp_path, digits, "scratch")
    ids = context.store.ids("train")[:3]
    lister = ImageLister(context.store, tmp_path, ids)
    lister.rows[int(ids[1])] = (str(tmp_path / "a, b.png"), "seven")
    assert lister.write_list(tmp_path / "list.csv", ids.tolist()) == 1
    assert read_rows(tmp_path / "list.csv") == [["path", "label"], [str(tmp_path / "a, b.png"), "seven"]]


def test_pairs_have_their_cosine(tmp_path: Path, digits: Store) -> None:
    ids = np.array([0, 1])
    lister = ImageLister(digits, tmp_path, ids)
    lister.rows = {0: ("/x/0.png", ""), 1: ("/x/1.png", "")}
    lister.write_pairs(tmp_path / "pairs.csv", [ImagePair(0, 1, 0.98765)])
    assert read_rows(tmp_path / "pairs.csv") == [["path", "near", "cosine"], ["/x/0.png", "/x/1.png", "0.9877"]]
    assert lister.write_list(tmp_path / "list.csv", [1, 0]) == 2
    assert read_rows(tmp_path / "list.csv") == [["path"], ["/x/1.png"], ["/x/0.png"]], "no labels, no column of them"
