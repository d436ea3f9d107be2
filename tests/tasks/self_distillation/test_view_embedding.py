"""Views of several sizes through an encoder."""

from typing import Any

import torch

from firstlight.tasks.nn.encoders import Encoder, pool_maps
from firstlight.tasks.self_distillation.patch_masks import replace_patches
from firstlight.tasks.self_distillation.view_embedding import embed_views
from tests.support.learners import build_encoder

VIT: dict[str, Any] = {"name": "timm", "model": "test_vit", "img_size": 32, "patch_size": 8}


def test_neighbouring_views_of_one_size_are_one_batch() -> None:
    encoder, sizes = build_encoder({}, 8), []
    encoder.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(inputs[0].shape[::3])))
    views = [torch.rand(3, 3, size, size) for size in (8, 8, 4, 4, 4)]
    found = embed_views(encoder, views, "avg")
    assert sizes == [(6, 8), (9, 4)]
    assert [view.pooled.shape[0] for view in found] == [3] * 5
    encoder.eval()
    for view, embedded in zip(views, embed_views(encoder, views, "avg"), strict=True):
        torch.testing.assert_close(embedded.map, encoder(view)[-1])
        torch.testing.assert_close(embedded.pooled, pool_maps(encoder(view), "avg"))


def test_every_view_has_its_own_mask() -> None:
    encoder, token = Encoder(VIT, 32).eval(), torch.randn(64)
    views = [torch.rand(2, 3, size, size) for size in (32, 32, 16)]
    masks = [torch.rand(2, size // 8, size // 8) < 0.4 for size in (32, 32, 16)]
    found = embed_views(encoder, views, "cls", (masks, token))
    for view, mask, embedded in zip(views, masks, found, strict=True):
        with replace_patches(encoder, mask, token):
            maps = encoder(view)
        torch.testing.assert_close(embedded.pooled, pool_maps(maps, "cls"))
        torch.testing.assert_close(embedded.map, maps[-1])


def test_no_view_is_nothing() -> None:
    assert embed_views(build_encoder({}, 8), [], "avg") == []
