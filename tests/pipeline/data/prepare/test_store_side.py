"""The stores that are bounded, their numbers of pixels, and the data of sources and earlier stores that are kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.image_statistics import describe_statistics
from firstlight.pipeline.data.images import decode_rgb
from firstlight.pipeline.data.prepare.store_side import choose_store_side, find_auto_side, has_larger_images
from firstlight.pipeline.data.sources import open_source
from firstlight.pipeline.errors import UserError
from tests.support.grey_images import dataset, images, local
from tests.support.image_sources import dataset_options
from tests.support.photograph_folders import (
    PHOTOGRAPH_SIZES,
    encode_photograph,
    make_photograph,
    photograph_options,
    prepare_photographs,
    write_photographs,
)
from tests.support.voc_folders import CAT, write_objects, write_voc

BOXES = r"dataset\.store_size: 64 is not valid with boxes.*valid: auto, off"
RESIZED = {"op": "random_resized_crop", "scale": (0.2, 1.0)}


@pytest.mark.parametrize(
    ("crop", "size", "side"),
    [
        (RESIZED, 64, 128),
        (RESIZED, 128, 256),
        (RESIZED, 224, 448),
        (RESIZED, 30, 64),
        ({"op": "random_resized_crop", "scale": (0.08, 1.0)}, 224, 704),
        ({"op": "center_crop", "scale": None, "size": None}, 224, 448),
        ({"op": "random_crop", "scale": 0.25, "size": None}, 64, 256),
        ({"op": "fit"}, 32, 64),
        ({"op": "random_crop", "scale": None, "size": 225}, 224, None),
    ],
)
def test_auto_is_twice_the_view_or_what_the_smallest_crop_needs(
    crop: dict[str, Any], size: int, side: int | None
) -> None:
    assert find_auto_side([({"op": "center_crop"}, 8), (crop, size)]) == side


def test_larger_images_are_stored_smaller_and_their_digests_stay(tmp_path: Path) -> None:
    root = write_photographs(tmp_path / "in", 20)
    (root / "a" / "copy.jpg").write_bytes((root / "b" / "001.jpg").read_bytes())
    plain, bounded = (prepare_photographs(root, tmp_path / "out", side) for side in (None, 32))
    assert plain.path != bounded.path
    assert (plain.store_side, bounded.store_side) == (None, 32)
    ids = np.arange(21)
    before, after = (store.read(ids)[0] for store in (plain, bounded))
    for old, new in zip(before, after, strict=True):
        high, wide = decode_rgb(old).shape[:2]
        if min(high, wide) <= 32:
            assert new == old
        else:
            small = decode_rgb(new)
            assert min(small.shape[:2]) == 32
            whole = Image.fromarray(decode_rgb(old)).resize(small.shape[1::-1], Image.Resampling.BICUBIC)
            assert np.abs(small.astype(int) - np.asarray(whole)).mean() < 4
    assert np.array_equal(plain.labels(), bounded.labels())
    assert plain.read_paths(ids) == bounded.read_paths(ids)
    assert plain.images["duplicates"] == bounded.images["duplicates"]
    assert bounded.images["duplicates"]["copies"] == 1
    facts = bounded.images["shrunk"]
    kept = sum(min(size) <= 32 for size in PHOTOGRAPH_SIZES) * 4
    assert (facts["images"], facts["side"]) == (21 - kept, 32)
    shrunk = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert facts["source_bytes"] == sum(len(old) for old, _ in shrunk)
    assert (
        facts["stored_bytes"]
        == sum(len(new) for _, new in shrunk)
        == bounded.images["bytes"] - sum(len(old) for old, new in zip(before, after, strict=True) if old == new)
    )
    told = describe_statistics(bounded.images, bounded.splits)
    assert any("17 of 21 images are stored with a shorter side of 32 pixels" in line for line in told)
    assert not any("dataset.store_size" in line for line in describe_statistics(plain.images, plain.splits))


def test_small_images_have_the_store_that_they_had(tmp_path: Path) -> None:
    root = images(tmp_path / "in", 12)
    before = local(dataset(root=root, store_size="off"), tmp_path / "out")
    again = local(dataset(root=root, store_size="auto"), tmp_path / "out")
    assert again.path == before.path
    root = write_photographs(tmp_path / "photographs", 10)
    plain = prepare_photographs(root, tmp_path / "out", store_size="off")
    assert prepare_photographs(root, tmp_path / "out", 96).path == plain.path, "no shorter side is longer than 77"
    assert prepare_photographs(root, tmp_path / "out", 64, store_size="off").path == plain.path
    assert prepare_photographs(root, tmp_path / "out", 64).path != plain.path
    assert "shrunk" not in plain.images


def test_a_stated_side_is_part_of_the_folder(tmp_path: Path) -> None:
    root = write_photographs(tmp_path / "in", 10)
    stores = [prepare_photographs(root, tmp_path / "out", 40, store_size=size) for size in (20, 30, 40, "auto")]
    assert len({store.path for store in stores[:3]}) == 3
    assert stores[2].path == stores[3].path
    assert len({store.hash for store in stores[:3]}) == 3


def test_any_of_the_looked_at_images_may_be_the_larger_one(tmp_path: Path) -> None:
    root = write_photographs(tmp_path / "in", 64, ((20, 20),))
    source = open_source(photograph_options(root))
    assert not has_larger_images(source, 20)
    assert has_larger_images(source, 19)
    (root / "a" / "000.jpg").write_bytes(encode_photograph(make_photograph(21, 40)))
    (root / "a" / "002.jpg").write_bytes(b"no image")
    assert has_larger_images(open_source(photograph_options(root)), 20)


def test_boxes_and_masks_keep_their_images(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "voc", train="000000\n000001\n")
    for number in range(2):
        write_objects(root, number, CAT)
    source = open_source(dataset_options(source="voc", root=root))
    assert "boxes" in source.annotations
    assert choose_store_side("auto", 2, source) is None
    with pytest.raises(UserError, match=BOXES):
        choose_store_side(64, None, source)


def test_an_extended_store_keeps_the_side_of_the_earlier_one(tmp_path: Path) -> None:
    root = write_photographs(tmp_path / "in", 10)
    old = prepare_photographs(root, tmp_path / "out", 32)
    write_photographs(root, 15)
    new = prepare_photographs(root, tmp_path / "out", 64, extends=old.path)
    assert (new.store_side, new.extension_edges) == (32, [0, 10, 15])
    ids = np.arange(10)
    assert new.read(ids)[0] == old.read(ids)[0]
    assert all(min(decode_rgb(data).shape[:2]) <= 32 for data in new.read(np.arange(10, 15))[0])
    assert new.images["shrunk"]["images"] == 12
    with pytest.raises(UserError, match=r"dataset\.store_size: 48 is not that of the extended store.*valid: auto, 32"):
        prepare_photographs(root, tmp_path / "out", extends=old.path, store_size=48)
    plain = prepare_photographs(write_photographs(tmp_path / "other", 10), tmp_path / "out", store_size="off")
    write_photographs(tmp_path / "other", 12)
    assert prepare_photographs(tmp_path / "other", tmp_path / "out", 32, extends=plain.path).store_side is None
