"""MAE: masks of (seed, pass, id), an encoder that sees the visible patches alone, and the loss on masked patches."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.pretrain import METHODS, batch_requirements
from firstlight.tasks.pretrain.mae import MaskedAutoEncoder
from firstlight.tasks.pretrain.method import BatchRequirements, TrainingInfo
from tests.support import gradient_cache
from tests.support import references_masked as references
from tests.support.batches import image_batch
from tests.support.gloo import Pool
from tests.support.learners import build_encoder
from tests.support.two_workers import assert_workers_equal_one

SIZE, SIDE, ROWS = 16, 4, 4
batch = partial(image_batch, size=SIZE, dtype=torch.float64)
INFO = TrainingInfo(size=96, epochs=3, seed=7)
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
VIT: dict[str, Any] = {"name": "timm", "model": "test_vit", "img_size": SIZE, "patch_size": SIDE}
DECODER: dict[str, Any] = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}


def method(
    dtype: torch.dtype = torch.float64, spec: dict[str, Any] | None = None, info: TrainingInfo = INFO, **options: Any
) -> MaskedAutoEncoder:
    torch.manual_seed(0)
    encoder = Encoder({**VIT, "mean": MEAN, "std": STD, **(spec or {})}, SIZE)
    return MaskedAutoEncoder(encoder, info, **{**DECODER, **options}).to(dtype)


def predict_naively(learner: MaskedAutoEncoder, seen: Batch) -> Tensor:
    """The predictions of each image on its own, by networks that are written out."""
    visible, masked = (numbers.tolist() for numbers in learner.draw_patches(seen))
    model: Any = learner.encoder.stages.model  # type: ignore[union-attr]
    found = []
    for image, seen_patches, hidden in zip(learner.encoder.input(seen.views[0]), visible, masked, strict=True):
        tokens = references.encode_visible(model, image, seen_patches, SIDE)
        found.append(references.decode_patches(learner.decoder, tokens, seen_patches, hidden, ROWS))
    return torch.stack(found)


@pytest.mark.parametrize("model", ["test_vit", "deit_tiny_distilled_patch16_224"])
def test_encoder_sees_the_visible_patches_and_the_decoder_all_places(model: str) -> None:
    learner, seen = method(spec={"model": model}), batch(3)
    # Positions are in single precision in the network, and exact in the reference.
    torch.testing.assert_close(learner.embed(seen)[0], predict_naively(learner, seen), rtol=0, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("count", "ratio", "kind"), [(1, 0.75, "rgb"), (5, 0.5, "rgb"), (3, 0.9, "gray")])
def test_loss_is_the_papers(count: int, ratio: float, kind: str, normalize: bool) -> None:
    learner = method(spec={"input": kind}, mask_ratio=ratio, normalize_pixels=normalize)
    seen = batch(count)
    (predicted,), (_, masked) = learner.embed(seen), learner.draw_patches(seen)
    assert predicted.shape == (count, 16 - int(16 * (1 - ratio)), SIDE**2 * (3 if kind == "rgb" else 1))
    images = learner.encoder.input(seen.views[0])
    expected = references.mae_loss(images, predicted, masked, SIDE, normalize)
    assert learner(seen)["loss"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
def test_psnr_is_that_of_masked_patches_in_pixels(normalize: bool) -> None:
    learner, seen = method(normalize_pixels=normalize).eval(), batch(4)
    (predicted,), (_, masked) = learner.embed(seen), learner.draw_patches(seen)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (MEAN, STD))
    expected = []
    for image, values, numbers in zip(seen.views[0], predicted.detach(), masked.tolist(), strict=True):
        normalised = (image - mean) / std
        for number, value in zip(numbers, values, strict=True):
            top, left = SIDE * (number // ROWS), SIDE * (number % ROWS)
            patch = normalised[:, top : top + SIDE, left : left + SIDE]
            square = value.view(SIDE, SIDE, 3).permute(2, 0, 1)
            patch[:] = square * (patch.var() + 1e-6).sqrt() + patch.mean() if normalize else square
        expected.append(references.masked_psnr(image, normalised * std + mean, numbers, SIDE))
    # Mean and deviation of the input are kept in single precision.
    assert learner.measure_images(seen)["psnr"].tolist() == pytest.approx(expected, rel=1e-6)
    assert learner(seen)["psnr"].item() == pytest.approx(sum(expected) / 4, rel=1e-6)


def test_a_perfect_prediction_costs_nothing() -> None:
    learner, seen = method(normalize_pixels=False), batch(2)
    _, masked = learner.draw_patches(seen)
    patches = [references.list_patches(image, SIDE) for image in learner.encoder.input(seen.views[0])]
    perfect = torch.tensor(
        [[of[k] for k in numbers] for of, numbers in zip(patches, masked.tolist(), strict=True)], dtype=torch.float64
    )
    told = learner.loss((perfect,), seen)
    assert told["loss"].item() == pytest.approx(0.0, abs=1e-12)
    assert told["psnr"].item() == pytest.approx(120.0)


@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(normalize: bool) -> None:
    """Half of the patches of gray images are enough: the loss is computed once for each of their values."""
    learner, seen = method(spec={"input": "gray"}, mask_ratio=0.5, normalize_pixels=normalize), batch(2)
    predicted = learner.embed(seen)[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: learner.loss((x,), seen)["loss"], predicted)


def test_loss_and_positions_are_lightlys(monkeypatch: pytest.MonkeyPatch) -> None:
    """lightly's utilities with this mask, as in its example of MAE, whose loss is torch's mean squared error."""
    utils = pytest.importorskip("lightly.models.utils")
    learner, seen = method(normalize_pixels=False), batch(5)
    visible, masked = learner.draw_patches(seen)
    noise = torch.zeros(5, 16).scatter(1, torch.cat((visible, masked), 1), torch.arange(16.0).expand(5, -1) + 1)
    # Its class token is the first of 17.
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.cat((torch.zeros(5, 1), noise), 1))
    kept, hidden = utils.random_token_mask((5, 17), mask_ratio=0.75)
    monkeypatch.undo()
    assert torch.equal(kept[:, 1:] - 1, visible)
    assert torch.equal(hidden - 1, masked)
    (predicted,) = learner.embed(seen)
    patches = utils.patchify(learner.encoder.input(seen.views[0]), SIDE)
    target = utils.get_at_index(patches, hidden - 1)
    theirs = torch.nn.functional.mse_loss(predicted, target)
    torch.testing.assert_close(learner.loss((predicted,), seen)["loss"], theirs, rtol=1e-12, atol=0)


def test_mask_is_a_function_of_seed_pass_and_id() -> None:
    learner, seen = method(), batch(40)
    visible, masked = learner.draw_patches(seen)
    assert (visible.shape, masked.shape) == ((40, 4), (40, 12))
    both = torch.cat((visible, masked), 1).sort().values
    assert torch.equal(both, torch.arange(16).expand(40, -1)), "each patch is visible or masked"
    assert torch.equal(learner.draw_patches(seen.select_range(7, 9))[0], visible[7:9])
    assert len({tuple(row) for row in visible.sort().values.tolist()}) > 35, "images differ"
    others = (
        learner.draw_patches(batch(40, turn=1)),
        learner.draw_patches(replace(seen, ids=seen.ids + 100)),
        method(info=replace(INFO, seed=8)).draw_patches(seen),
    )
    assert all((other[0] != visible).any(1).sum() > 35 for other in others)


def test_pixels_of_masked_patches_do_not_reach_the_prediction() -> None:
    learner, seen = method(), batch(3)
    images = seen.views[0].clone().requires_grad_()
    learner.embed(replace(seen, views=(images,)))[0].square().sum().backward()
    assert images.grad is not None
    touched = torch.tensor(
        [[any(patch) for patch in references.list_patches(image, SIDE)] for image in images.grad.abs()]
    )
    expected = torch.zeros(3, 16, dtype=torch.bool).scatter(1, learner.draw_patches(seen)[0], True)
    assert torch.equal(touched, expected)


def test_views_of_another_size_have_their_own_grid() -> None:
    learner = method(info=replace(INFO, view_sizes=(24,)))
    told = learner(batch(2, size=24))
    assert learner.embed(batch(2, size=24))[0].shape == (2, 27, 48)
    assert told["loss"].isfinite()
    assert learner.measure_images(batch(2))["psnr"].isfinite().all(), "held-out images have the encoder's size"


@pytest.mark.parametrize("positions", ["learned", "fixed"])
def test_two_workers_equal_one(pool: Pool, positions: str) -> None:
    build = partial(method, positions=positions)
    one = assert_workers_equal_one(pool, build, batch(12), batch(12, turn=1), atol=1e-10)
    trained = {name for name, parameter in build().named_parameters() if parameter.requires_grad}
    assert set(one.gradients) == trained, "no trained parameter is without a gradient"


def test_three_workers_equal_one(pool3: Pool) -> None:
    assert_workers_equal_one(pool3, method, batch(12), atol=1e-10)


def test_a_batch_embedded_in_parts_has_the_loss_of_the_whole() -> None:
    whole, parted = (method().train() for _ in range(2))
    gradient_cache.assert_parts_equal_whole(whole, parted, batch(12), 4)


def test_loss_is_single_precision_under_autocast() -> None:
    learner, seen = method(torch.float32), batch(4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = learner.embed(seen)
        assert outputs[0].dtype == torch.bfloat16
        told = learner.loss(outputs, seen)
    assert told["loss"].dtype == torch.float32
    for name, value in learner.loss((outputs[0].float(),), seen).items():
        torch.testing.assert_close(told[name], value, rtol=0, atol=0)


def test_fixed_positions_are_sines_that_are_not_trained() -> None:
    learner, own = method(positions="fixed"), method()
    model: Any = learner.encoder.stages.model  # type: ignore[union-attr]
    expected = torch.tensor([references.position(64, k // ROWS, k % ROWS) for k in range(16)], dtype=torch.float64)
    torch.testing.assert_close(model.pos_embed[0, 1:], expected, rtol=0, atol=1e-6)
    assert not model.pos_embed[0, 0].any()
    assert not model.pos_embed.requires_grad
    trained: Any = own.encoder.stages.model  # type: ignore[union-attr]
    assert trained.pos_embed.requires_grad
    assert (trained.pos_embed[0, 1:] - expected).abs().max() > 0.5, "those of timm"


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        ("test_vit", {}, (128, 2, 4)),
        ("vit_small_patch16_224", {}, (512, 8, 16)),
        ("vit_small_patch16_224", {"decoder_dim": 48, "decoder_depth": 3}, (48, 3, 1)),
        ("test_vit", {"decoder_heads": 8}, (128, 2, 8)),
    ],
)
def test_decoder_is_the_papers_for_encoders_as_wide_as_a_vit_small(
    model: str, options: dict[str, int], expected: tuple[int, ...]
) -> None:
    learner = MaskedAutoEncoder(Encoder({**VIT, "model": model}, SIZE), INFO, **options)
    blocks: Any = learner.decoder.blocks
    assert (learner.decoder.mask_token.shape[2], len(blocks), blocks[0].attn.num_heads) == expected


@pytest.mark.parametrize("normalize", [True, False])
def test_grid_shows_masked_patches_grey_and_then_filled(normalize: bool) -> None:
    learner, seen = method(normalize_pixels=normalize).eval(), batch(3, turn=2)
    (grid,) = learner.image_grids(seen, "test images")
    given = ", from the true mean and deviation of each patch" if normalize else ""
    assert grid.title == f"test images, masked and reconstructed{given}"
    assert [(row.caption, row.untrained) for row in grid.rows] == [
        ("original", False),
        ("masked", False),
        ("reconstructed", True),
    ]
    original, masked, filled = (row.images for row in grid.rows)
    torch.testing.assert_close(original, seen.views[0].float(), rtol=0, atol=1e-6)
    visible, hidden = (numbers.tolist() for numbers in learner.draw_patches(seen))
    for k in range(3):
        patches = [references.list_patches(image[k], SIDE) for image in (original, masked, filled)]
        for number in visible[k]:
            assert patches[1][number] == patches[2][number] == patches[0][number]
        for number in hidden[k]:
            assert patches[1][number] == pytest.approx([*MEAN] * 16, abs=1e-6)
            assert patches[2][number] != patches[0][number]


def test_grid_of_a_gray_input_is_gray() -> None:
    (grid,) = method(spec={"input": "gray"}).eval().image_grids(batch(2))
    assert {row.images.shape for row in grid.rows} == {(2, 1, SIZE, SIZE)}


def test_training_learns_to_fill_patches() -> None:
    """Patches of smooth images are filled better than by their mean."""
    learner = method(torch.float32, mask_ratio=0.5, normalize_pixels=False, decoder_dim=32)
    ramp = torch.linspace(0, 1, SIZE).expand(3, SIZE, SIZE)
    images = torch.stack([(a * ramp + b * ramp.mT) / 2 for a in (0.2, 1.0) for b in (0.1, 0.6, 1.0)])
    seen = replace(batch(6, dtype=torch.float32), views=(images,))
    optimiser = torch.optim.Adam([p for p in learner.parameters() if p.requires_grad], lr=0.003)
    first = learner.measure_images(seen)["psnr"].mean()
    for step in range(60):
        optimiser.zero_grad()
        learner(replace(seen, passes=torch.full_like(seen.passes, step)))["loss"].backward()
        optimiser.step()
    assert learner.measure_images(seen)["psnr"].mean() > first + 8


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"name": "timm", "model": "swin_tiny_patch4_window7_224", "img_size": 64}, "has no tokens of one resolution"),
        ({"name": "timm", "model": "convnext_atto"}, "has no tokens of one resolution"),
        ({"name": "timm", "model": "test_vit", "img_size": 64, "input": "rgb"}, ""),
        ({"name": "timm", "model": "test_vit_relpos", "img_size": 64}, "has positions in its attention"),
        ({"name": "timm", "model": "eva02_tiny_patch14_224", "img_size": 56}, "has positions in its attention"),
        ({"name": "timm", "model": "vit_tiny_r_s16_p8_224", "img_size": 64}, "computes its tokens from more"),
        ({"name": "resnet18"}, "has no tokens of one resolution"),
    ],
)
def test_encoders_that_need_all_patches_are_refused(spec: dict[str, Any], reason: str) -> None:
    encoder = Encoder(spec, 56 if "eva02" in str(spec) else 64)
    if not reason:
        assert MaskedAutoEncoder(encoder, INFO).decoder is not None
        return
    with pytest.raises(ValueError, match=rf"^encoder\.model: '{spec.get('model', spec['name'])}' {reason}.*; valid: a"):
        MaskedAutoEncoder(encoder, INFO)


@pytest.mark.parametrize(
    ("options", "spec", "message"),
    [
        ({"mask_ratio": 0.99}, {}, r"^mask_ratio: 0\.99 leaves no patch of 16 visible"),
        ({"mask_ratio": 1e-17}, {}, r"^mask_ratio: 1e-17 leaves no patch of 16 visible, or none masked"),
        ({"decoder_dim": 6}, {}, r"^decoder_dim: 6 .*; valid: multiples of 4$"),
        ({"decoder_heads": 3}, {}, r"^decoder_heads: 3 does not divide decoder_dim: 8; valid: 1, 2, 4, 8$"),
        ({}, {"input": "sobel"}, r"^encoder\.input: 'sobel' is not an image .*; valid: rgb, gray$"),
        ({}, {"input": "rgb_sobel"}, r"^encoder\.input: 'rgb_sobel' is not an image"),
        ({}, {"normalize": "image"}, r"^encoder\.normalize: 'image' cannot be undone .*; valid: dataset$"),
        ({}, {"patch_size": 1, "input": "gray"}, r"^normalize_pixels: true is not valid for patches of one value"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: dict[str, Any], spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(spec=spec, **options)


def test_one_view_is_required() -> None:
    assert batch_requirements("mae", {}) == BatchRequirements(views=1)
    assert METHODS["mae"] is MaskedAutoEncoder
    with pytest.raises(ValueError, match=r"^encoder\.model: 'convnet' has no tokens"):
        MaskedAutoEncoder(build_encoder({}, 8), INFO)
