"""Image files that people have, from a folder to the pixels of a training batch: read, or told, never black or lost."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from firstlight.pipeline.data.loader import Loader, StoredImages
from firstlight.pipeline.data.manifest import QUARANTINE_FILE
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.report.data_notes import describe_problems
from firstlight.pipeline.run.input_colours import measure_colours
from tests.support import recipes
from tests.support.image_sources import dataset_options, prepare_store
from tests.support.odd_images import (
    encode_image,
    encode_png_16,
    encode_tiff_16,
    make_exif,
    make_large_texts,
    make_noise,
)

CROP = ({"op": "center_crop", "scale": 1.0},)
NOISE = make_noise(16, 16)


def write_folder(root: Path, *images: bytes, ending: str = "png") -> Path:
    """Writes the images as two classes, beside two ordinary ones."""
    for k, data in enumerate((*images, encode_image(NOISE), encode_image(make_noise(16, 16, 1)))):
        file = root / "ab"[k % 2] / f"{k}.{ending}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return root


def prepare_images(root: Path, **fields: Any) -> tuple[Store, list[str]]:
    """Returns the store of a folder, and the notes that the terminal and the report show."""
    options = dataset_options(source="folder", root=root, max_bad_fraction=0.9, **fields)
    store = prepare_store(options, root.parent / f"{root.name}-stores")
    recipe = recipes.recipe(root.parent, dataset=options.model_dump(mode="json"))
    return store, describe_problems(recipe, store)


def load_pixels_of(store: Store) -> np.ndarray:
    """Returns (n, S, S, 3) pixels as a training gets them."""
    return np.asarray(Loader(store, (CROP,), 16, 0, 10_000).load_once(store.ids("train"))["views"][:, 0])


def make_ramp(top: float, channels: int = 1) -> np.ndarray:
    """(16, 16, C) levels from 0 to `top`, each in many steps."""
    return np.repeat(np.linspace(0, top, 256).reshape(16, 16, 1), channels, 2)


DEEP: dict[str, tuple[Callable[[np.ndarray], bytes], int]] = {
    "png": (lambda levels: encode_image(levels[:, :, 0].astype(np.uint16)), 1),
    "tiff": (lambda levels: encode_image(levels[:, :, 0].astype(np.uint16), "TIFF"), 1),
    "signed tiff": (lambda levels: encode_image(levels[:, :, 0].astype(np.int32), "TIFF"), 1),
    "float tiff": (lambda levels: encode_image(levels[:, :, 0].astype(np.float32), "TIFF"), 1),
    "unit float tiff": (lambda levels: encode_image((levels[:, :, 0] / 65535).astype(np.float32), "TIFF"), 1),
    "colour png": (lambda levels: encode_png_16(levels.astype(np.uint16)), 3),
    "colour tiff": (lambda levels: encode_tiff_16(levels.astype(np.uint16)), 3),
    "deflated tiff": (lambda levels: encode_tiff_16(levels.astype(np.uint16), ">", deflate=True), 3),
    "png with alpha": (
        lambda levels: encode_png_16(np.dstack([levels.astype(np.uint16), np.full((16, 16), 65535)]).astype(np.uint16)),
        3,
    ),
}


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("name", DEEP)
def test_data_of_few_bits_use_the_whole_range(tmp_path: Path, name: str, bits: int) -> None:
    encode, channels = DEEP[name]
    ramps = [encode(make_ramp(top, channels)) for top in (2**bits - 1, 2 ** (bits - 1))]
    store, notes = prepare_images(write_folder(tmp_path / "in", *ramps), test_fraction=0.0)
    pixels = load_pixels_of(store).max((1, 2, 3)).tolist()
    # One range for all images: the second has half of the levels of the first.
    assert sorted(pixels[:2]) == pytest.approx([128, 255], abs=1) or sorted(pixels)[:2] == pytest.approx(
        [128, 250], abs=8
    )
    (kind,) = store.levels
    assert any(f"2 images of {kind} have levels 0 to " in line and "is white" in line for line in notes)
    stored = StoredImages(store, 16, 16, 1000).load(
        *(store.ids("train"),) * 2, Loader(store, (CROP,), 16, 0, 1000).read_encoded(store.ids("train"))
    )
    np.testing.assert_array_equal(stored["views"][:, 0].max((1, 2, 3)), pixels)
    # The network's input is normalised by the mean of these pixels, too.
    mean = load_pixels_of(store).mean() / 255
    assert np.mean(measure_colours(store, 10_000).mean) == pytest.approx(mean, abs=0.002)


def test_depth_is_stated_and_images_beyond_it_are_reported(tmp_path: Path) -> None:
    ramps = [encode_image(make_ramp(top)[:, :, 0].astype(np.uint16)) for top in (4095, 65535)]
    root = write_folder(tmp_path / "in", *ramps)
    plain, notes = prepare_images(root, test_fraction=0.0)
    assert plain.levels == {"16-bit grey": (0.0, 65535.0)}
    assert any("65,535 is white" in line and "1 of them use less than a sixteenth" in line for line in notes)
    store, notes = prepare_images(root, test_fraction=0.0, depth=12)
    assert store.levels == {"16-bit grey": (0.0, 4095.0)}
    assert store.path != plain.path
    (row,) = pq.read_table(store.path / QUARANTINE_FILE).to_pylist()
    assert row["reason"] == "has the level 65535; dataset.depth: 12 bits hold 0 to 4095"
    assert any(line.startswith("1 image cannot be decoded (1 levels), listed in ") for line in notes)
    _, notes = prepare_images(write_folder(tmp_path / "plain"), test_fraction=0.0, depth=12)
    assert "dataset.depth: 12 has no effect: no image has more than 8 bits a sample" in notes


def test_sixteen_bits_in_use_are_read_as_before_without_a_note(tmp_path: Path) -> None:
    ramp = encode_image(make_ramp(65535)[:, :, 0].astype(np.uint16))
    store, notes = prepare_images(write_folder(tmp_path / "in", ramp), test_fraction=0.0)
    assert not any("levels" in line for line in notes)
    expected = np.rint(make_ramp(65535)[:, :, 0].astype(np.uint16) / 257)
    assert any((pixels[:, :, 0] == expected).all() for pixels in load_pixels_of(store))


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000"])
def test_formats_of_the_endings_that_are_listed_are_read(tmp_path: Path, kind: str) -> None:
    ending = {"AVIF": "avif", "JPEG2000": "jp2"}[kind]
    store, _ = prepare_images(write_folder(tmp_path / "in", encode_image(make_noise(16, 16, 2), kind), ending=ending))
    assert store.quarantined == 0
    assert store.images["formats"] == {kind: 1, "PNG": 2}


def test_format_of_an_extra_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    heic = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(500)
    store, notes = prepare_images(write_folder(tmp_path / "in", heic, ending="heic"), test_fraction=0.0)
    (row,) = pq.read_table(store.path / QUARANTINE_FILE).to_pylist()
    assert row["reason"] == "is HEIC, which needs an extra: pip install 'firstlight[heic]'"
    assert any("1 image cannot be decoded (1 needs an extra)" in line for line in notes)
    with pytest.raises(UserError, match=r"max_bad_fraction.*firstlight\[heic\]"):
        prepare_store(
            dataset_options(source="folder", root=tmp_path / "in", max_bad_fraction=0.1), tmp_path / "in-stores"
        )


def make_cut_jpeg(missing: int) -> bytes:
    return encode_image(make_noise(40, 40, 3), "JPEG")[:-missing]


PAGES = io.BytesIO()
NOISE.save(PAGES, "TIFF", save_all=True, append_images=[make_noise(16, 16, 4)])


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (
            encode_image(NOISE, **make_large_texts("text")),
            "PNG files read without their texts and colour profiles, which are too large or damaged: 1",
        ),
        (
            encode_image(NOISE, **make_large_texts("profile")),
            "PNG files read without their texts and colour profiles, which are too large or damaged: 1",
        ),
        (make_cut_jpeg(2), "JPEG files without their end marker, read as every pixel is there: 1"),
        (make_cut_jpeg(1), "JPEG files without their end marker, read as every pixel is there: 1"),
        (encode_image(Image.new("RGB", (16, 16), "red")), "images of one colour: 1"),
        (
            encode_image(np.arange(256, dtype=np.uint8).reshape(16, 16) % 30),
            "images without a level above 31 of 255: 1",
        ),
        (PAGES.getvalue(), "files of several images (animations, pages), of which the first is read: 1"),
        *(
            (
                encode_image(make_noise(16, 12), kind, exif=make_exif(6)),
                "images turned upright by their EXIF orientation: 1",
            )
            for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")
        ),
    ],
    ids=range(12),
)
def test_conversion_of_odd_images_is_reported(tmp_path: Path, data: bytes, told: str) -> None:
    store, notes = prepare_images(write_folder(tmp_path / "in", data), test_fraction=0.0)
    assert store.quarantined == 0
    assert told in notes
    assert sum(store.images["readings"].values()) == 1


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (make_cut_jpeg(300), "truncated"),
        (encode_image(NOISE)[:-200], "truncated"),
        (b"no image", "unreadable"),
        (encode_image(make_noise(300, 300)), "too large"),
        (encode_image(np.array([[np.nan, 1.0]], np.float32), "TIFF"), "levels"),
    ],
)
def test_quarantined_images_are_counted_by_kind(tmp_path: Path, data: bytes, kind: str) -> None:
    store, notes = prepare_images(write_folder(tmp_path / "in", data), test_fraction=0.0, max_pixels=50_000)
    assert store.images["refused"] == {kind: 1}
    assert any(line.startswith(f"1 image cannot be decoded (1 {kind}), listed in ") for line in notes)


def test_ordinary_images_have_no_note_and_no_new_entry_in_the_manifest(tmp_path: Path) -> None:
    store, notes = prepare_images(write_folder(tmp_path / "in", encode_image(make_noise(16, 16, 5), "JPEG")))
    assert not {"readings", "refused", "levels", "level_counts"} & store.images.keys()
    assert not [line for line in notes if "image" in line and "class" not in line]


def test_extended_store_keeps_the_range_of_its_images(tmp_path: Path) -> None:
    def encode_top(top: int) -> bytes:
        return encode_image(make_ramp(top)[:, :, 0].astype(np.uint16))

    root = write_folder(tmp_path / "in", encode_top(4000), encode_top(3000))
    old, _ = prepare_images(root, test_fraction=0.0)
    before = load_pixels_of(old)
    (root / "a" / "9.png").write_bytes(encode_top(1000))
    new, _ = prepare_images(root, test_fraction=0.0, extends=old.path)
    assert new.levels == old.levels
    assert new.images["levels"]["16-bit grey"]["images"] == 3
    np.testing.assert_array_equal(load_pixels_of(new)[: len(before)], before)
    (root / "a" / "9.png").write_bytes(encode_top(10_000))
    with pytest.raises(UserError, match=r"dataset\.extends: the images of 16-bit grey have levels 0 to 10,000"):
        prepare_images(root, test_fraction=0.0, extends=old.path)
