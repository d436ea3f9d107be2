"""Masks of patches: shares, keys, and a forward pass that does not depend on masked pixels."""

from typing import Any

import pytest
import torch

from firstlight.tasks.counter_rng import derive_keys
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.self_distillation.patch_masks import (
    choose_patches,
    draw_block_masks,
    gather_patches,
    is_maskable,
    replace_patches,
)
from tests.support.learners import build_encoder

VIT: dict[str, Any] = {"name": "timm", "model": "test_vit", "img_size": 32, "patch_size": 8}


def keys(count: int, turn: int = 0, seed: int = 5) -> torch.Tensor:
    ids = torch.arange(count)
    return derive_keys(seed, torch.full_like(ids, turn), ids, 1)


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (4, 4), (8, 8), (14, 14), (5, 9)])
@pytest.mark.parametrize("ratio", [(0.1, 0.5), (0.3, 0.3), (0.6, 0.9)])
def test_masks_cover_at_most_their_share(rows: int, columns: int, ratio: tuple[float, float]) -> None:
    masks = draw_block_masks(keys(200), rows, columns, 1.0, ratio)
    shares = masks.double().mean((1, 2))
    assert masks.shape == (200, rows, columns)
    assert float(shares.max()) <= ratio[1]
    if rows >= 8:
        assert abs(float(shares.mean()) - sum(ratio) / 2) < 0.06, "blocks nearly reach the share"
        assert bool((shares > 0).all())


def test_share_of_images_with_a_mask_is_the_probability() -> None:
    for probability in (0.0, 0.5, 1.0):
        masks = draw_block_masks(keys(2000), 8, 8, probability, (0.1, 0.5))
        assert abs(float(masks.flatten(1).any(1).double().mean()) - probability) < 0.04


def test_masks_are_blocks_and_not_single_patches() -> None:
    """Masked patches have more masked neighbours than those of a random mask of the same share."""
    masks = draw_block_masks(keys(500), 14, 14, 1.0, (0.3, 0.3)).double()
    pairs = (masks[:, 1:] * masks[:, :-1]).mean() / masks.mean()
    assert float(pairs) > 0.6
    assert float(masks.mean()) < 0.31


def test_every_patch_is_masked_alike_from_left_to_right_and_top_to_bottom() -> None:
    masks = draw_block_masks(keys(4000), 8, 8, 1.0, (0.3, 0.3)).double().mean(0)
    torch.testing.assert_close(masks, masks.flip(0), rtol=0.0, atol=0.04)
    torch.testing.assert_close(masks, masks.flip(1), rtol=0.0, atol=0.04)
    torch.testing.assert_close(masks, masks.T, rtol=0.0, atol=0.04)


def test_masks_are_functions_of_seed_pass_and_id() -> None:
    masks = draw_block_masks(keys(40), 8, 8, 1.0, (0.1, 0.5))
    order = torch.randperm(40)
    assert torch.equal(draw_block_masks(keys(40)[order], 8, 8, 1.0, (0.1, 0.5)), masks[order])
    for other in (keys(40, turn=1), keys(40, seed=6)):
        assert not torch.equal(draw_block_masks(other, 8, 8, 1.0, (0.1, 0.5)), masks)


def test_chosen_patches_contain_all_masked_ones_with_their_weights() -> None:
    masks = [draw_block_masks(keys(20, turn=view), 6, 6, 0.7, (0.1, 0.5)) for view in range(2)]
    places, weights = choose_patches(masks, 0.5)
    assert [place.shape for place in places] == [(20, 18), (20, 18)]
    assert weights.shape == (20, 36)
    numbers = torch.arange(36).reshape(1, 1, 6, 6).expand(20, 2, 6, 6)
    for view, (mask, of_view) in enumerate(zip(masks, weights.chunk(2, 1), strict=True)):
        for image in range(20):
            chosen = gather_patches([numbers], [places[view]])[image, :, 0]
            counted = set(chosen[of_view[image] > 0].tolist())
            assert counted == set(mask[image].flatten().nonzero()[:, 0].tolist())
    total = sum(mask.flatten(1).any(1).double() for mask in masks) / 2
    torch.testing.assert_close(weights.sum(1), total)


def test_gathered_patches_are_the_tokens_of_their_places() -> None:
    map_ = torch.randn(3, 5, 4, 4)
    place = torch.tensor([[0, 5], [15, 3], [7, 7]])
    found = gather_patches([map_, map_], [place, place])
    assert found.shape == (3, 4, 5)
    assert torch.equal(found[1, 0], map_[1, :, 3, 3])
    assert torch.equal(found[0, 3], map_[0, :, 1, 1])


@pytest.mark.parametrize("dynamic", [True, False])
def test_masked_pixels_change_nothing_and_others_do(dynamic: bool) -> None:
    encoder = Encoder({**VIT, "dynamic_img_size": dynamic}, 32).eval()
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 1, 2] = True
    images, token = torch.rand(2, 3, 32, 32), torch.randn(64)
    inside, outside = images.clone(), images.clone()
    inside[0, :, 8:16, 16:24] = 0.0
    outside[0, :, 8:16, 8:16] = 0.0
    with torch.no_grad(), replace_patches(encoder, mask, token):
        found, same, other = (encoder(x)[-1] for x in (images, inside, outside))
    assert torch.equal(found, same)
    assert not torch.equal(found[0], other[0])
    with torch.no_grad():
        plain = encoder(images)[-1]
    assert torch.equal(plain[1], found[1])
    assert not torch.equal(plain[0], found[0])
    assert not encoder.stages.model.patch_embed._forward_hooks  # type: ignore[operator, union-attr]


def test_compiled_encoder_has_the_mask_of_each_block() -> None:
    encoder, images, token = Encoder(VIT, 32).eval(), torch.rand(2, 3, 32, 32), torch.randn(64)
    compiled = Encoder(VIT, 32).eval()
    compiled.load_state_dict(encoder.state_dict())
    compiled.compile(backend="eager")
    for mask in (torch.zeros(2, 4, 4, dtype=torch.bool), torch.ones(2, 4, 4, dtype=torch.bool), keyed_mask()):
        with torch.no_grad(), replace_patches(encoder, mask, token):
            wanted = encoder(images)[-1]
        with torch.no_grad(), replace_patches(compiled, mask, token):
            torch.testing.assert_close(compiled(images)[-1], wanted)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images)[-1], encoder(images)[-1])


def keyed_mask() -> torch.Tensor:
    return draw_block_masks(keys(2), 4, 4, 1.0, (0.3, 0.5))


def test_token_has_a_gradient_also_where_nothing_is_masked() -> None:
    encoder, token = Encoder(VIT, 32), torch.zeros(64, requires_grad=True)
    for masked in (False, True):
        token.grad = None
        with replace_patches(encoder, torch.full((2, 4, 4), masked), token):
            encoder(torch.rand(2, 3, 32, 32))[-1].square().sum().backward()
        assert token.grad is not None
        assert bool(token.grad.any()) == masked


def test_only_a_vit_of_one_tower_can_be_masked() -> None:
    assert is_maskable(Encoder(VIT, 32))
    assert not is_maskable(Encoder({**VIT, "input": "rgb_sobel"}, 32))
    assert not is_maskable(build_encoder({}, 8))
