"""An encoder that embeds images of any kind: what it takes, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.image_encoder import ImageEncoder

SPEC = {"name": "convnet", "input": "rgb", "norm": "sync", "width": 4, "depth": 2}


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    torch.manual_seed(0)
    encoder = ImageEncoder(SPEC, 8)
    encoder.eval()
    return encoder


def test_embed_takes_paths_images_arrays_and_tensors(encoder: ImageEncoder, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    channels_first = torch.from_numpy(pixels).permute(2, 0, 1)
    same: list[Any] = [
        *(str(tmp_path / "a.png"), tmp_path / "a.png", image, pixels, channels_first, channels_first.float() / 255),
    ]
    vectors = encoder.embed(same)
    assert vectors.dtype == np.float32
    assert vectors.shape == (6, encoder.shapes[-1][0])
    np.testing.assert_array_equal(vectors, encoder.embed([pixels] * 6))
    assert np.abs(vectors - encoder.embed([255 - pixels])).max() > 0


def test_embed_takes_grey_images_of_any_size_and_none_at_all(encoder: ImageEncoder) -> None:
    grey = np.full((8, 8), 77, np.uint8)
    tensor = torch.from_numpy(grey)[None]
    flat = encoder.embed([grey, tensor, Image.fromarray(grey), np.full((30, 20, 3), 77, np.uint8)])
    np.testing.assert_allclose(flat, np.repeat(flat[:1], 4, 0), rtol=1e-6)
    assert encoder.embed([]).shape == (0, encoder.shapes[-1][0])


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (torch.zeros(2, 8, 8), r"images\[1\].*\(2, 8, 8\)"),
        (torch.full((3, 8, 8), 2.0), r"images\[1\].*0\.\.1"),
        (np.zeros((8, 8, 5), np.uint8), r"images\[1\]"),
        ("absent.png", r"absent\.png.*No such file"),
    ],
)
def test_embed_names_an_input_that_is_no_image(encoder: ImageEncoder, image: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        encoder.embed([np.zeros((8, 8, 3), np.uint8), image])


@pytest.mark.parametrize("as_file", [True, False])
def test_embed_reads_few_bits_by_their_depth_and_never_as_black(
    encoder: ImageEncoder, tmp_path: Path, as_file: bool
) -> None:
    ramp = np.linspace(0, 1, 144).reshape(12, 12)
    deep, plain = (
        (ramp * 1023).astype(np.uint16),
        np.rint((ramp * 1023).astype(np.uint16) / 1023 * 255).astype(np.uint8),
    )
    Image.fromarray(deep).save(tmp_path / "deep.png")
    image: Any = tmp_path / "deep.png" if as_file else deep
    np.testing.assert_array_equal(encoder.embed([image], depth=10), encoder.embed([plain]))
    assert encoder.embed([(deep * 64).astype(np.uint16)]).shape == (1, encoder.shapes[-1][0])
    with pytest.raises(UserError, match=r"up to 1023, and would be nearly black; valid: depth=10"):
        encoder.embed([image])
    with pytest.raises(UserError, match=r"has the level 1023; .*9 bits hold 0 to 511"):
        encoder.embed([image], depth=9)
