"""Headers of some images of a source."""

from pathlib import Path

from firstlight.pipeline.data.prepare.header_probe import iterate_headers
from tests.support.folders_of_noise import write_noise_folder
from tests.support.image_sources import open_folder_set


def test_headers_are_those_of_the_wanted_images_without_broken_ones(tmp_path: Path) -> None:
    for k, side in enumerate((10, 20, 30, 40, 50)):
        write_noise_folder(tmp_path / "train" / f"{k}", {".": 1}, (side, side + 1), mode="L" if k == 1 else "RGB")
    (tmp_path / "train" / "2" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    source = open_folder_set(tmp_path)
    found = [(header.frame.upright, header.mode) for header in iterate_headers(source, [0, 3], 3)]
    assert found == [((10, 11), "RGB"), ((20, 21), "L"), ((40, 41), "RGB"), ((50, 51), "RGB")]
    assert not list(iterate_headers(source, [], 3))
