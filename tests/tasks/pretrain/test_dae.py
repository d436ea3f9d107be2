from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from firstlight.tasks.corruption import LEVEL_STREAM, NOISE_STREAM, draw_squares
from firstlight.tasks.counter_rng import derive_keys
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.pretrain.dae import DenoisingAutoEncoder, euclidean_loss
from firstlight.tasks.pretrain.method import TrainingInfo
from tests.support import references
from tests.support.batches import batch_of_images, draw_two_batches, image_batch
from tests.support.gloo import Pool
from tests.support.learners import build_encoder, build_method
from tests.support.two_workers import assert_workers_equal_one

CORRUPTIONS = ["pixel_gaussian", "patch_gaussian", "big_block", "small_blocks"]
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
SIZE = 8
batch = partial(image_batch, size=SIZE)
SPEC: dict[str, Any] = {"depth": 3, "mean": MEAN, "std": STD}


def encoder(size: int = SIZE, norm: str = "group", **spec: Any) -> Encoder:
    return build_encoder({"norm": norm, **SPEC, **spec}, size)


def method(
    dtype: torch.dtype = torch.float32, norm: str = "group", images: int = 96, size: int = SIZE, **options: Any
) -> DenoisingAutoEncoder:
    info, spec = TrainingInfo(size=images, epochs=5, seed=7), {"norm": norm, **SPEC}
    settings = {"norm": norm, "init": "default", **options}
    return build_method(DenoisingAutoEncoder, info, spec, size, dtype, **settings)


def test_the_loss_is_the_euclidean_loss() -> None:
    clean, reconstructed = draw_two_batches()
    assert float(euclidean_loss(reconstructed, clean)) == pytest.approx(
        references.dae_loss(clean, reconstructed), rel=1e-12
    )


def test_gradcheck() -> None:
    clean, reconstructed = draw_two_batches((2, 1, 2, 3))
    assert torch.autograd.gradcheck(lambda x: euclidean_loss(x, clean), (reconstructed.requires_grad_(),))


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_loss_of_a_step_is_the_papers_formula(corruption: str) -> None:
    """The target is the clean image, the network's input the corrupted one, both 0-centred and normalised.

    PSNR is in pixels of 0..1.
    """
    learner, images = method(torch.float64, corruption=corruption), batch(torch.arange(5), dtype=torch.float64)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(1, 3, 1, 1) for x in (MEAN, STD))
    (clean,), corrupted = images.views, learner.corrupt_images(images)
    output = learner.decoder(learner.encoder(corrupted), (corrupted - mean) / std).detach()
    losses = {name: value.detach() for name, value in learner(images).items()}
    tolerance = 1e-6  # mean and std are kept in float32
    assert float(losses["loss"]) == pytest.approx(references.dae_loss((clean - mean) / std, output), rel=tolerance)
    assert float(losses["psnr"]) == pytest.approx(references.dae_psnr(clean, output * std + mean), rel=tolerance)


def test_noise_is_in_units_of_255_and_its_level_is_drawn_per_image() -> None:
    learner, images = method(size=16, images=400), batch(torch.arange(400), size=16)
    noise = learner.corrupt_images(images) - images.views[0]
    levels = 255 * noise.flatten(1).square().mean(1).sqrt()
    assert stats.kstest(levels.numpy(), stats.uniform(10, 40).cdf).pvalue > 1e-3
    fixed = method(size=16, sigma=(25.0, 25.0)).corrupt_images(images) - images.views[0]
    assert float(255 * fixed.std()) == pytest.approx(25, rel=0.002)


def test_noise_level_and_noise_have_different_streams() -> None:
    assert LEVEL_STREAM != NOISE_STREAM


@pytest.mark.parametrize(
    ("corruption", "images", "blocks", "count", "sides"),
    [
        ("big_block", 96, None, 1, (8, 14)),
        ("small_blocks", 99_999, None, 21, (4, 4)),
        ("small_blocks", 100_000, None, 35, (4, 4)),
        ("small_blocks", 100_000, 3, 3, (4, 4)),
    ],
)
def test_blocks_are_set_to_the_mean_and_other_pixels_are_kept(
    corruption: str, images: int, blocks: int | None, count: int, sides: tuple[int, int]
) -> None:
    learner, seen = (
        method(size=29, images=images, corruption=corruption, blocks=blocks),
        batch(torch.arange(6), size=29, turn=2),
    )
    squares = draw_squares(derive_keys(7, seen.passes, seen.ids, NOISE_STREAM), count, sides, 29)
    corrupted = learner.corrupt_images(seen)
    for k in range(6):
        own = list(zip(*(part[k].tolist() for part in squares), strict=True))
        assert torch.equal(corrupted[k], references.dae_blocked(seen.views[0][k], own, list(MEAN)))
        hidden = (corrupted[k] != seen.views[0][k]).any(0)
        assert learner.encoder.input(corrupted)[k][:, hidden].abs().max() == 0, "0 once centred"


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_corruption_of_an_image_does_not_depend_on_its_batch(corruption: str) -> None:
    learner = method(corruption=corruption)
    together = learner.corrupt_images(batch(torch.tensor([3, 9, 40, 11]), turn=1))
    alone = learner.corrupt_images(batch(torch.tensor([40]), turn=1))
    assert torch.equal(together[2], alone[0])
    again = method(corruption=corruption)
    assert torch.equal(again.corrupt_images(batch(torch.tensor([11, 40]), turn=1))[1], alone[0])


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_passes_images_and_seeds_differ(corruption: str) -> None:
    ids = torch.arange(32)
    same = batch_of_images(torch.rand(1, 3, 29, 29).expand(32, -1, -1, -1), ids=ids)
    learner = method(size=29, corruption=corruption)
    first = learner.corrupt_images(same)
    assert len({tuple(image.flatten().tolist()) for image in first}) > 28, "images"
    assert (first != learner.corrupt_images(replace(same, passes=torch.ones_like(ids)))).flatten(1).any(1).sum() > 28, (
        "passes"
    )
    info = TrainingInfo(size=96, epochs=5, seed=8)
    other = DenoisingAutoEncoder(encoder(29), info, corruption=corruption)  # type: ignore[arg-type]
    assert (first != other.corrupt_images(same)).flatten(1).any(1).sum() > 28, "seeds"


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_parts_are_embedded_like_the_whole(corruption: str) -> None:
    learner, whole = method(torch.float64, corruption=corruption), batch(torch.arange(12), dtype=torch.float64)
    parts = [learner.embed(whole.select_range(start, start + 4))[0] for start in (0, 4, 8)]
    together = learner.loss((torch.cat(parts),), whole)
    expected = learner(whole)
    for name, value in expected.items():
        torch.testing.assert_close(together[name], value, rtol=1e-10, atol=0)


def test_loss_does_not_depend_on_the_order_of_the_batch() -> None:
    learner, order = method(torch.float64), torch.randperm(32)
    ids = torch.arange(32)
    first, second = learner(batch(ids, dtype=torch.float64)), learner(batch(ids[order], dtype=torch.float64))
    for name in ("loss", "psnr"):
        torch.testing.assert_close(first[name], second[name], rtol=1e-10, atol=0)


@pytest.mark.fault(38, "zeros, equal images, huge values: the auto-encoder")
@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_constant_and_equal_images_have_finite_losses(corruption: str, value: float) -> None:
    learner, ids = method(corruption=corruption, norm="batch"), torch.arange(8)
    losses = learner(batch_of_images(torch.full((8, 3, SIZE, SIZE), value), ids=ids))
    losses["loss"].backward()
    assert all(bool(torch.isfinite(x)) for x in losses.values())
    assert all(bool(torch.isfinite(p.grad).all()) for p in learner.parameters() if p.grad is not None)


@pytest.mark.parametrize("shortcuts", ["none", "input_output", "full"])
def test_every_parameter_gets_a_gradient(shortcuts: str) -> None:
    learner = method(shortcuts=shortcuts, init="gaussian", norm="batch")
    learner(batch(torch.arange(16)))["loss"].backward()
    for name, parameter in learner.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"input": "sobel"}, "encoder.input: "),
        ({"input": "rgb_sobel"}, "encoder.input: "),
        ({"input": "high_pass"}, "encoder.input: "),
        ({"normalize": "image"}, "encoder.normalize: "),
    ],
)
def test_encoder_with_irreversible_input_raises(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}"):
        DenoisingAutoEncoder(encoder(**spec), TrainingInfo(size=10, epochs=1, seed=0))


def test_sigma_bounds_in_wrong_order_raise() -> None:
    with pytest.raises(ValueError, match=r"^sigma: "):
        method(sigma=(50.0, 10.0))


@pytest.mark.parametrize("input", ["rgb", "gray"])
def test_image_grids_show_reconstructions_and_features(input: str) -> None:
    learner = DenoisingAutoEncoder(
        encoder(input=input), TrainingInfo(size=10, epochs=1, seed=0), corruption="big_block"
    )
    pictures = {picture.name: picture for picture in learner.eval().image_grids(batch(torch.arange(4)))}
    assert set(pictures) == {"reconstructions", "feature_maps"}
    assert pictures["reconstructions"].title == "held-out images, corrupted and reconstructed"
    tested = learner.image_grids(batch(torch.arange(4)), "test images")
    assert all("test images" in picture.title for picture in tested)
    assert [row.caption for row in pictures["reconstructions"].rows] == ["clean", "corrupted", "reconstruction"]
    shown = {row.caption: row.images for row in pictures["reconstructions"].rows}
    for picture in shown.values():
        assert picture.shape == (4, 1 if input == "gray" else 3, SIZE, SIZE)
        assert not picture.requires_grad
        assert picture.min() >= 0
        assert picture.max() <= 1
    same = shown["clean"] == shown["corrupted"]
    assert same.any()
    assert not same.all()
    if input == "rgb":
        torch.testing.assert_close(shown["clean"], batch(torch.arange(4)).views[0])
    maps = [row for row in pictures["feature_maps"].rows if row.maps is not None]
    assert [row.caption.split(", ")[1] for row in maps] == ["clean", "corrupted"] * (len(maps) // 2)
    for row, other in zip(maps[::2], maps[1::2], strict=True):
        assert row.maps is not None
        assert other.maps is not None
        assert max(float(row.maps.max()), float(other.maps.max())) == pytest.approx(1.0), (
            "clean and corrupted are on one scale"
        )
        assert min(float(row.maps.min()), float(other.maps.min())) >= 0
        assert not torch.equal(row.maps, other.maps)


def test_shown_map_selects_the_map() -> None:
    learner, images = method(shown_map=2, corruption="big_block").eval(), batch(torch.arange(3))
    rows = next(picture for picture in learner.image_grids(images) if picture.name == "feature_maps").rows
    with torch.no_grad():
        clean = learner.encoder(images.views[0])[1]
    assert {row.maps.shape[1:] for row in rows if row.maps is not None} == {clean.shape[2:]}
    with pytest.raises(ValueError, match="shown_map: 9 is none of the encoder's 3 feature maps; valid: 1 to 3"):
        method(shown_map=9)


def test_decoder_is_exported() -> None:
    learner = method()
    assert learner.exported_networks() == {"decoder": learner.decoder}


def smooth_images(count: int, size: int) -> Tensor:
    """Images (count, 3, size, size) in 0..1 of coarse noise, interpolated."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    return F.interpolate(coarse, size, mode="bicubic", align_corners=True).clamp(0, 1)


@pytest.mark.parametrize(
    ("corruption", "shortcuts"), [("pixel_gaussian", "none"), ("pixel_gaussian", "full"), ("small_blocks", "full")]
)
def test_denoising_lowers_the_error_of_held_out_images(corruption: str, shortcuts: str) -> None:
    """The error of held-out images falls well below that of the corrupted images themselves."""
    torch.manual_seed(0)
    network = Encoder({"name": "network1", "m": (1, 2, 0, 0), "width": 8}, 15)
    options: dict[str, Any] = {"corruption": corruption, "sigma": (50.0, 50.0), "shortcuts": shortcuts}
    learner = DenoisingAutoEncoder(network, TrainingInfo(size=512, epochs=8, seed=0), **options)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
    images, ids = smooth_images(640, 15), torch.arange(640)
    for epoch in range(8):
        for rows in torch.randperm(512).split(32):
            optimizer.zero_grad()
            learner(batch_of_images(images[rows], ids=rows, turn=epoch))["loss"].backward()
            optimizer.step()
    held_out = batch_of_images(images[512:], ids=ids[512:])
    with torch.no_grad():
        clean, corrupted = (learner.encoder.input(x) for x in (held_out.views[0], learner.corrupt_images(held_out)))
        error = learner.eval()(held_out)["loss"]
    assert error < 0.6 * euclidean_loss(corrupted, clean)


def assert_denoising_workers_equal_one(pool: Pool, count: int, corruption: str, norm: str) -> None:
    info, spec = TrainingInfo(size=96, epochs=5, seed=7), {"norm": norm, **SPEC}
    settings = {"corruption": corruption, "norm": norm, "init": "default"}
    build = partial(build_method, DenoisingAutoEncoder, info, spec, SIZE, torch.float64, **settings)
    assert_workers_equal_one(pool, build, batch(torch.arange(count), dtype=torch.float64, turn=3), atol=1e-10)


@pytest.mark.parametrize("norm", ["group", "sync"])
@pytest.mark.parametrize("corruption", ["pixel_gaussian", "small_blocks"])
def test_two_workers_equal_one(pool: Pool, corruption: str, norm: str) -> None:
    assert_denoising_workers_equal_one(pool, 64, corruption, norm)


@pytest.mark.parametrize("norm", ["group", "sync"])
def test_three_workers_equal_one(pool3: Pool, norm: str) -> None:
    assert_denoising_workers_equal_one(pool3, 48, "pixel_gaussian", norm)
