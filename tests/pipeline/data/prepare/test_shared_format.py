"""The format that images share where they are no colour images: the most common one, or none."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.channels.pixel_format import PixelFormat
from firstlight.pipeline.data.prepare.shared_format import SharedFormat, find_shared_format, probe_images
from tests.support.channel_images import draw_bands, encode_bands, encode_pages
from tests.support.dicom_files import encode_dicom
from tests.support.image_sources import open_folder_set
from tests.support.odd_images import encode_image

BANDS = encode_bands(draw_bands(0))
PAGES = encode_pages(draw_bands(0, 5, side=20))
PHOTOGRAPH = encode_image(Image.new("RGB", (8, 8)), "JPEG")
BROKEN = b"II*\0junk"


def find_shared(folder: Path, files: Mapping[str, bytes]) -> SharedFormat | None:
    (folder / "train").mkdir()
    for name, data in files.items():
        (folder / "train" / name).write_bytes(data)
    source = open_folder_set(folder)
    return find_shared_format(probe_images(source, range(source.splits["train"])))


@pytest.mark.parametrize(
    ("files", "channels", "bits", "side", "text"),
    [
        ({"0.tif": BANDS, "1.tif": BANDS}, 13, 16, 32, "13 channels of 16 bits"),
        ({"0.tif": PAGES, "1.tif": PAGES}, 5, 16, 20, "5 channels of 16 bits"),
        ({"0.dcm": encode_dicom(np.zeros((9, 7), np.uint16))}, 1, 16, 7, "1 channel of 16 bits"),
        ({"0.tif": PAGES, "1.tif": BANDS, "2.tif": BANDS, "3.tif": BROKEN}, 13, 16, 32, None),
        ({"0.tif": BROKEN, "1.tif": BANDS, "2.tif": BANDS}, 13, 16, 32, "13 channels of 16 bits in 2 of 3"),
    ],
)  # fmt: skip
def test_most_common_format_is_shared(
    tmp_path: Path, files: dict[str, bytes], channels: int, bits: int, side: int, text: str | None
) -> None:
    found = find_shared(tmp_path, files)
    if text is None:
        # A page of TIFF can be read, and other images cannot: nothing is common to all.
        assert found is None
        return
    assert found is not None
    assert (found.pixels, found.side) == (PixelFormat(channels, bits), side)
    assert str(found).removesuffix(" that were tried") == text


@pytest.mark.parametrize(
    "files",
    [
        {"0.tif": BANDS, "1.jpg": PHOTOGRAPH},
        {"0.jpg": PHOTOGRAPH, "1.tif": BROKEN},
        {"0.tif": BROKEN},
        # The pages of a document are no channels where another one has more of them.
        {"0.tif": PAGES, "1.tif": encode_pages(draw_bands(0, 4, side=20))},
        {"0.tif": encode_bands(draw_bands(0, 1))},
    ],
)
def test_no_format_is_shared_if_colours_or_no_pixels_can_be_read(tmp_path: Path, files: dict[str, bytes]) -> None:
    assert find_shared(tmp_path, files) is None


def test_no_image_after_one_of_colours_is_read(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for k in range(4):
        (tmp_path / "train" / f"{k}.jpg").write_bytes(PHOTOGRAPH)
    positions = iter(range(4))
    assert find_shared_format(probe_images(open_folder_set(tmp_path), positions)) is None
    assert next(positions) == 1


FLOATS = encode_bands(draw_bands(0).astype(np.float32))


def test_reason_is_that_of_the_reading_that_says_more(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    files = {
        "0.tif": FLOATS,
        "1.png": b"\x89PNG\r\n\x1a\n broken",
        "2.tif": BANDS,
    }
    for name, data in files.items():
        (tmp_path / "train" / name).write_bytes(data)
    floats, broken, bands = probe_images(open_folder_set(tmp_path), range(3))
    assert floats.reason.startswith("has 32 bits a channel, floats; valid: ")
    assert "JPEG2000" in broken.reason, "the formats of colours"
    assert (bands.header, bands.reason) == (None, "")
