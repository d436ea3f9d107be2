"""Reconstructions: their ratio, the images that they are of, and figures of features."""

from typing import Any

import pytest
import torch
import torchmetrics

from firstlight.tasks.nn.decoder import Decoder
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.reconstruction import (
    check_reconstructable,
    check_shown_map,
    draw_reconstructions,
    flatten_patches,
    join_patches,
    measure_psnr,
    most_varied_channels,
    psnr,
    reconstruct_images,
    undo_normalisation,
)
from tests.support import references, references_masked
from tests.support.batches import draw_two_batches
from tests.support.learners import build_encoder

MEAN, STD, SIZE = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), 8


def encoder(**spec: Any) -> Encoder:
    return build_encoder({"norm": "group", "depth": 3, "mean": MEAN, "std": STD, **spec}, SIZE)


def test_psnr_equals_torchmetrics() -> None:
    clean, reconstructed = draw_two_batches()
    found = psnr(reconstructed, clean)
    assert float(found.mean()) == pytest.approx(references.dae_psnr(clean, reconstructed), rel=1e-12)
    for k in range(len(clean)):
        theirs = torchmetrics.functional.image.peak_signal_noise_ratio(reconstructed[k], clean[k], data_range=1.0)
        assert float(found[k]) == pytest.approx(float(theirs), rel=1e-5)
    assert psnr(clean + 0.1, clean).tolist() == pytest.approx([20.0] * len(clean))
    assert psnr(clean, clean).tolist() == pytest.approx([120.0] * len(clean))


def test_pixels_undo_the_normalisation() -> None:
    images = torch.rand(2, 3, SIZE, SIZE)
    rgb = encoder().input
    torch.testing.assert_close(undo_normalisation(rgb, rgb(images)), images)
    gray = encoder(input="gray").input
    levels = images[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(undo_normalisation(gray, gray(levels)), levels[:, :1], rtol=1e-4, atol=1e-5)


def test_features_are_those_that_vary_most_in_the_deepest_large_map() -> None:
    deep, small = torch.zeros(2, 5, 8, 8), torch.rand(2, 5, 4, 4)
    deep[:, 3, 0, 0], deep[0, 1, 0, 0] = 6.0, 2.0
    found = most_varied_channels([torch.rand(2, 5, 16, 16), deep, small], [torch.rand(2, 5, 16, 16), 2 * deep, small])
    assert list(found)[:2] == [3, 1]
    clean, corrupted = found[3]
    assert clean.shape == (2, 8, 8)
    assert (float(clean[0, 0, 0]), float(corrupted[0, 0, 0])) == (0.5, 1.0)
    assert float(found[list(found)[2]][0].max()) == 0.0, "a feature that is nowhere active is no division by zero"
    assert next(iter(most_varied_channels([small], [small]).values()))[0].shape == (2, 4, 4)


def test_ratio_of_a_network_is_that_of_its_reconstructions_in_pixels() -> None:
    torch.manual_seed(0)
    network = encoder().eval()
    decoder = Decoder(network.shapes, 3, SIZE, norm="group", init="default").eval()
    images, corrupted = torch.rand(4, 3, SIZE, SIZE), torch.rand(4, 3, SIZE, SIZE)
    found = reconstruct_images(network, decoder, corrupted).detach()
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    torch.testing.assert_close(found, decoder(network(corrupted), (corrupted - mean) / std))
    ratios = measure_psnr(network.input, found, images)
    assert not ratios.requires_grad
    assert float(ratios.mean()) == pytest.approx(references.dae_psnr(images, found * std + mean), rel=1e-5)


def test_grids_have_the_images_that_were_given_and_their_name() -> None:
    torch.manual_seed(0)
    network = encoder().eval()
    decoder = Decoder(network.shapes, 3, SIZE, norm="group").eval()
    images, corrupted = torch.rand(2, 3, SIZE, SIZE), torch.rand(2, 3, SIZE, SIZE)
    reconstructions, features = draw_reconstructions(network, decoder, images, corrupted, "test images", 2)
    assert (reconstructions.title, features.title) == (
        "test images, corrupted and reconstructed",
        "where features are active, in test images and in the same images corrupted",
    )
    clean, dirty, _ = (row.images for row in reconstructions.rows)
    torch.testing.assert_close((clean, dirty), (images, corrupted))
    assert {row.maps.shape[1] for row in features.rows if row.maps is not None} == {network.shapes[1][1]}


def test_missing_map_is_named_with_the_valid_numbers() -> None:
    check_shown_map(encoder(), None)
    check_shown_map(encoder(), 3)
    with pytest.raises(ValueError, match="shown_map: 4 is none of the encoder's 3 feature maps; valid: 1 to 3"):
        check_shown_map(encoder(), 4)


@pytest.mark.parametrize(("shape", "side"), [((2, 3, 8, 12), 4), ((1, 1, 6, 6), 2), ((2, 2, 3, 3), 1)])
def test_patches_are_cut_in_row_order_and_joined_again(shape: tuple[int, ...], side: int) -> None:
    images, _ = draw_two_batches(shape)
    patches = flatten_patches(images, side)
    assert patches.tolist() == [references_masked.list_patches(image, side) for image in images]
    assert torch.equal(join_patches(patches, side, shape[2] // side), images)


def test_patches_are_lightlys() -> None:
    utils = pytest.importorskip("lightly.models.utils")
    images, _ = draw_two_batches((2, 3, 8, 8))
    patches = flatten_patches(images, 4)
    assert torch.equal(patches, utils.patchify(images, 4))
    assert torch.equal(join_patches(patches, 4, 2), utils.unpatchify(patches, 4))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"input": "high_pass"}, r"^encoder\.input: 'high_pass' is not an image .*; valid: rgb, gray$"),
        ({"normalize": "image"}, r"^encoder\.normalize: 'image' cannot be undone .*; valid: dataset$"),
    ],
)
def test_input_that_is_no_image_is_named(spec: dict[str, Any], message: str) -> None:
    check_reconstructable(encoder(input="gray"))
    with pytest.raises(ValueError, match=message):
        check_reconstructable(encoder(**spec))
