"""The attention of the class token: that of the network itself, and nothing for others."""

from typing import Any

import pytest
import torch

from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.self_distillation.attention_maps import compute_class_attention, draw_class_attention
from tests.support.learners import build_encoder

VIT: dict[str, Any] = {"name": "timm", "model": "test_vit", "img_size": 32, "patch_size": 8}


def build_vit(model: str = "test_vit") -> Encoder:
    torch.manual_seed(0)
    return Encoder({**VIT, "model": model}, 32).eval()


@pytest.mark.parametrize("model", ["test_vit", "test_vit2", "test_vit3"])
def test_attention_is_what_the_network_multiplies_its_values_by(model: str) -> None:
    """The reference is the input of `attn_drop` without fused attention. Some of these networks have registers."""
    encoder, images = build_vit(model), torch.rand(3, 3, 32, 32)
    found = compute_class_attention(encoder, images)
    if found is None:
        assert not encoder.has_class_token
        return
    attention: Any = encoder.stages.model.blocks[-1].attn  # type: ignore[union-attr, index]
    attention.fused_attn, seen = False, []
    attention.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    encoder(images)
    torch.testing.assert_close(found.flatten(2), seen[0][:, :, 0, -16:])
    assert bool((found.sum((2, 3)) < 1.0).all()), "the rest is that of the class token and the registers"
    assert not attention._forward_pre_hooks


def test_attention_has_the_grid_of_the_image() -> None:
    found = compute_class_attention(build_vit(), torch.rand(2, 3, 48, 48))
    assert found is not None
    assert found.shape[2:] == (6, 6)


def test_grid_has_a_row_for_the_mean_and_for_each_head() -> None:
    images = torch.rand(2, 3, 32, 32)
    (grid,) = draw_class_attention(build_vit(), images, "held-out images")
    heads = compute_class_attention(build_vit(), images)
    assert heads is not None
    assert [row.caption for row in grid.rows][:3] == ["image", "mean of all heads", "head 1"]
    assert len(grid.rows) == 2 + heads.shape[1]
    assert grid.title.endswith("held-out images")
    assert [row.untrained for row in grid.rows[:3]] == [False, True, False]
    for row in grid.rows[1:]:
        assert row.maps is not None
        assert row.maps.shape == (2, 4, 4)
        assert (float(row.maps.min()), float(row.maps.max())) == (0.0, pytest.approx(1.0))


def test_convolutional_network_has_no_attention() -> None:
    assert compute_class_attention(build_encoder({}, 8), torch.rand(2, 3, 8, 8)) is None
    assert draw_class_attention(build_encoder({}, 8), torch.rand(2, 3, 8, 8), "images") == ()
