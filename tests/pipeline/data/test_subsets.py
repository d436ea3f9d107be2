"""Subsets of the training split hold ids, without the images that have none."""

from pathlib import Path

import pytest

from firstlight.pipeline.data.manifest import SUBSETS_FILE
from firstlight.pipeline.data.prepare import prepare as module
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.subsets import describe_lost_images
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import dataset_options, make_png, prepare_store

CUT = (0, 3, 4, 9, 10, 11)  # images that cannot be decoded


def listed(root: Path, count: int = 14) -> Path:
    """VOC's layout with images of which some are cut off; train is every third of trainval, val all others."""
    for k in range(count):
        file = root / f"JPEGImages/{k:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(make_png(k)[:60] if k in CUT else make_png(k))
    lists = {
        "trainval": range(12),
        "train": range(0, 12, 3),
        "val": sorted(set(range(12)) - set(range(0, 12, 3))),
        "test": range(12, count),
    }
    for name, places in lists.items():
        (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (root / f"ImageSets/Main/{name}.txt").write_text("".join(f"{k:02d}\n" for k in places))
    return root


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(
        module, "IMAGES_PER_SHARD", 3
    )  # the last of four parts of the training split has one good image fewer than none
    return prepare_store(
        dataset_options(source="voc", root=listed(tmp_path / "in"), max_bad_fraction=0.9), tmp_path / "out"
    )


def test_subset_ids_skip_images_that_cannot_be_decoded(store: Store) -> None:
    good = [k for k in range(12) if k not in CUT]
    assert store.splits["train"] == len(good)
    for name, places in (("train", range(0, 12, 3)), ("val", set(range(12)) - set(range(0, 12, 3)))):
        assert store.subset(name).tolist() == [good.index(k) for k in good if k in places]
        assert store.subsets["images"][name] == len(store.subset(name))
    assert store.subsets["lost"] == {"train": 3, "val": 3}
    assert describe_lost_images(store.subsets) == ["train 3", "val 3"]
    assert store.read(store.subset("val"))[0] == [make_png(k) for k in good if k % 3]


def test_unknown_subset_names_the_valid_ones(store: Store, digits: Store) -> None:
    with pytest.raises(
        UserError, match=r"subset: 'trian' is not in the store .*; did you mean 'train'\? \(valid: train, val\)"
    ):
        store.subset("trian")
    with pytest.raises(UserError, match=r"subset: 'train' is not in the store .*; it has none"):
        digits.subset("train")


@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_damaged_subsets_file_is_named(store: Store, damage: str) -> None:
    file = store.path / SUBSETS_FILE
    content = bytearray(file.read_bytes())
    content[20] ^= 1
    file.unlink() if damage == "gone" else file.write_bytes(content if damage == "bit" else content[:-9])
    for read in (lambda: store.subset("train"), store.verify):
        with pytest.raises(UserError, match=r"subsets\.parquet: is missing or damaged: .*; delete the folder"):
            read()
