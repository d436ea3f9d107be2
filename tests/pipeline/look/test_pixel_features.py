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
from firstlight.pipeline.look.pixel_features import THUMBNAIL_SIDE, ThumbnailReader, embed_pixels


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
