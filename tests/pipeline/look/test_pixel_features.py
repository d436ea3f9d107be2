"""Features of pixels tell copies from other images, and thumbnails are small pictures of the images."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.config.dataset import DatasetOptions
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.look.pixel_features import (
    MAX_FEATURE_NUMBERS,
    THUMBNAIL_SIDE,
    ThumbnailReader,
    choose_feature_side,
    describe_pixel_features,
    embed_pixels,
)
from tests.support.channel_images import band_recipe, draw_bands, encode_bands, prepare_bands


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """0: an image; 1: it smaller, brighter and as a JPEG; 2: another; 3: one colour."""
    folder = tmp_path_factory.mktemp("looked") / "train"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, name in ((0, "0"), (2, "2")):
        coarse = Image.fromarray(rng.integers(0, 200, (6, 8, 3), dtype=np.uint8))
        image = coarse.resize((120, 90), Image.Resampling.BICUBIC)
        image.save(folder / f"{name}.png")
        if number == 0:
            bright = Image.fromarray(np.asarray(image.resize((80, 60))) // 2 + 60)
            bright.save(folder / "1.jpg", quality=60)
    Image.new("RGB", (50, 40), (9, 120, 200)).save(folder / "3.png")
    options = DatasetOptions(
        name="folder",
        source="folder",
        root=str(folder.parent),
        image_size=32,
        train_augment=({"op": "center_crop"},),
        eval_augment=({"op": "center_crop"},),
        test_fraction=0.0,
    )
    return prepare(options, folder.parent / "stores", lambda: False, lambda done, total: None)


def test_copies_are_near_and_others_are_not(store: Store) -> None:
    ids = store.ids("train")
    order = np.argsort([str(path) for path in store.read_paths(ids)])
    seen = list[tuple[int, int]]()
    rows = embed_pixels(store, ids[order], lambda done, total: seen.append((done, total)))
    assert rows.shape == (4, 768)
    assert seen == [(4, 4)]
    cosines = rows @ rows.T
    assert cosines[0, 1] > 0.99
    assert abs(cosines[0, 2]) < 0.5
    np.testing.assert_allclose(np.diag(cosines)[:3], 1.0, rtol=1e-5)
    assert not rows[3].any(), "one colour is like nothing"


def test_thumbnails_are_small_pictures(store: Store) -> None:
    found = ThumbnailReader(store).read(store.ids("train"))
    assert list(found) == store.ids("train").tolist()
    for uri in found.values():
        head, _, data = uri.partition(",")
        assert head == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert max(image.size) <= THUMBNAIL_SIDE


def test_reader_needs_no_folder_of_images(store: Store, tmp_path: Path) -> None:
    assert ThumbnailReader(store).read(np.empty(0, np.int64)) == {}


@pytest.mark.parametrize(("channels", "side"), [(1, 16), (3, 16), (16, 16), (17, 8), (64, 8), (200, 4), (512, 2)])
def test_many_channels_have_fewer_pixels(channels: int, side: int) -> None:
    assert choose_feature_side(channels) == side
    assert channels * side**2 <= MAX_FEATURE_NUMBERS


def write_bands(folder: Path, images: dict[str, np.ndarray]) -> Store:
    (folder / "images/train").mkdir(parents=True)
    for name, values in images.items():
        (folder / "images/train" / f"{name}.tif").write_bytes(encode_bands(values))
    recipe = band_recipe(folder, folder / "images", dataset__test_fraction=0.0)
    return prepare_bands(recipe, folder)


def test_all_channels_count_alike(tmp_path: Path) -> None:
    """Images that differ in a channel of small levels alone are not near, and copies in other sizes are."""
    base = draw_bands(0, side=32).astype(np.float64)
    # The last channel has a hundredth of the others' levels.
    base[:, :, 12] /= 100
    other = base.copy()
    other[:, :, 12] = draw_bands(1, side=32)[:, :, 12] / 100
    images = {"a": base, "b": other, "c": base.repeat(2, 0).repeat(2, 1), "d": np.full((9, 9, 13), 700)}
    store = write_bands(tmp_path, {name: values.astype(np.uint16) for name, values in images.items()})
    rows = embed_pixels(store, np.arange(4), lambda done, total: None)
    assert rows.shape == (4, 13 * 16**2)
    assert (rows[0] @ rows[2]) > 0.999
    assert 0.85 < (rows[0] @ rows[1]) < 0.96, "one channel of thirteen"
    assert not rows[3].any(), "one level is like nothing"
    assert describe_pixel_features(store) == (
        "pixels of 13 channels at 16 x 16, each without its mean and scaled to the same spread"
    )


def test_thumbnails_of_bands_are_colours(tmp_path: Path) -> None:
    store = write_bands(tmp_path, {str(k): draw_bands(k, side=100) >> 4 for k in range(3)})
    reader = ThumbnailReader(store)
    assert reader.shown is not None
    assert reader.shown.channels == (0, 1, 2)
    for data in reader.read_files(store.ids("train")).values():
        with Image.open(io.BytesIO(data)) as image:
            assert (image.mode, image.size) == ("RGB", (THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            assert np.ptp(np.asarray(image)) > 150
