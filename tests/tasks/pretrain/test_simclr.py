"""SimCLR: NT-Xent and its decoupled form, over the images of all workers."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.pretrain import METHODS, batch_requirements, default_views
from firstlight.tasks.pretrain.method import BatchRequirements, TrainingInfo
from firstlight.tasks.pretrain.simclr import SimClr, contrast_views
from tests.support import gradient_cache
from tests.support import references_contrastive as references
from tests.support.batches import image_batch
from tests.support.gloo import Pool
from tests.support.learners import build_method
from tests.support.single_precision import assert_loss_is_single_precision
from tests.support.two_workers import assert_workers_equal_one

batch = partial(image_batch, dtype=torch.float64, views=2)

INFO = TrainingInfo(size=96, epochs=3, seed=7)
BOTH = pytest.mark.parametrize("decoupled", [False, True])


def draw_projections(count: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Projections of two views, of any length; those of one image are near."""
    rng = torch.Generator().manual_seed(seed)
    first, noise = torch.randn(2, count, dim, generator=rng, dtype=torch.float64)
    return first, first + 0.8 * noise


def contrast(first: Tensor, second: Tensor, temperature: float, decoupled: bool) -> Tensor:
    return contrast_views(F.normalize(first, dim=1), F.normalize(second, dim=1), temperature, decoupled)[0]


def method(norm: str = "sync", dtype: torch.dtype = torch.float64, **options: Any) -> SimClr:
    return build_method(SimClr, INFO, {"norm": norm}, dtype=dtype, **{"dim": 6, "norm": norm, **options})


@BOTH
@pytest.mark.parametrize(("count", "dim", "temperature"), [(2, 3, 0.5), (5, 4, 0.1), (17, 9, 1.3)])
def test_the_loss_is_equation_1(count: int, dim: int, temperature: float, decoupled: bool) -> None:
    first, second = draw_projections(count, dim)
    wanted = references.nt_xent(first, second, temperature, decoupled)
    assert float(contrast(first, second, temperature, decoupled)) == pytest.approx(wanted, rel=1e-12)


@BOTH
def test_gradcheck(decoupled: bool) -> None:
    views = [view.requires_grad_() for view in draw_projections(4, 3)]
    assert torch.autograd.gradcheck(lambda a, b: contrast(a, b, 0.4, decoupled), views)


@BOTH
def test_the_loss_is_lightlys_of_one_process(decoupled: bool) -> None:
    """`NTXentLoss` without memory bank, and `DCLLoss` without weights."""
    losses = pytest.importorskip("lightly.loss")
    theirs = losses.DCLLoss(temperature=0.3) if decoupled else losses.NTXentLoss(temperature=0.3)
    first, second = draw_projections(11, 5, seed=3)
    torch.testing.assert_close(contrast(first, second, 0.3, decoupled), theirs(first, second), rtol=1e-12, atol=0)


def test_accuracy_is_the_share_of_views_nearest_to_their_partner() -> None:
    first, second = (F.normalize(view, dim=1) for view in draw_projections(23, 3, seed=1))
    z, hits = torch.cat((first, second)), 0
    for i in range(46):
        nearest = max((k for k in range(46) if k != i), key=lambda k: float(z[i] @ z[k]))
        hits += nearest == (i + 23) % 46
    for decoupled in (False, True):
        assert float(contrast_views(first, second, 0.5, decoupled)[1]) == pytest.approx(hits / 46)
    assert 0 < hits < 46


def test_the_method_contrasts_its_projections() -> None:
    learner, seen = method(temperature=0.2), batch(7)
    first, second = learner.embed(seen)
    assert first.shape == second.shape == (7, 6)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(7, dtype=torch.float64))
    assert float(learner(seen)["loss"].detach()) == pytest.approx(
        references.nt_xent(first, second, 0.2, False), rel=1e-12
    )
    decoupled = method(temperature=0.2, decoupled=True)(seen)["loss"]
    assert float(decoupled.detach()) == pytest.approx(references.nt_xent(first, second, 0.2, True), rel=1e-12)


def test_both_views_pass_the_networks_as_one_batch() -> None:
    learner, seen = method(norm="batch").train(), batch(6)
    together = torch.cat(learner.embed(seen))
    features = learner.encoder(torch.cat(seen.views))[-1].mean((2, 3))
    torch.testing.assert_close(together, F.normalize(learner.projector(features), dim=1), rtol=1e-12, atol=0)


def test_views_may_differ_in_size() -> None:
    small, large = (image_batch(torch.arange(4), size=size, dtype=torch.float64) for size in (8, 12))
    learner = method(norm="group", hidden=(64,), dim=64)
    seen = Batch(small.ids, small.rows, small.labels, (large.views[0], small.views[0]), small.passes)
    first, second = learner.embed(seen)
    features = [learner.encoder(view)[-1].mean((2, 3)) for view in seen.views]
    for found, of_view in zip((first, second), features, strict=True):
        torch.testing.assert_close(found, F.normalize(learner.projector(of_view), dim=1))


@BOTH
def test_two_workers_equal_one(pool: Pool, decoupled: bool) -> None:
    assert_workers_equal_one(pool, partial(method, decoupled=decoupled), batch(12), batch(12))


@BOTH
def test_three_workers_equal_one(pool3: Pool, decoupled: bool) -> None:
    assert_workers_equal_one(pool3, partial(method, decoupled=decoupled), batch(12))


@BOTH
def test_a_batch_embedded_in_parts_has_the_loss_of_the_whole(decoupled: bool) -> None:
    whole, parted = (method(norm="group", hidden=(64,), dim=64, decoupled=decoupled).train() for _ in range(2))
    gradient_cache.assert_parts_equal_whole(whole, parted, batch(12), 4)


def test_loss_is_single_precision_under_autocast() -> None:
    assert_loss_is_single_precision(method(dtype=torch.float32), batch(6, dtype=torch.float32))


def test_every_network_is_trained() -> None:
    vit = {"name": "timm", "model": "test_vit", "img_size": 8, "patch_size": 4}
    for learner in (method(), SimClr(Encoder(vit, 8), INFO, dim=6).double()):
        learner(batch(4))["loss"].backward()
        assert all(p.grad is not None and p.grad.any() for p in learner.projector.parameters())
        assert next(learner.encoder.parameters()).grad is not None


def test_projector_is_as_wide_as_the_features_by_default() -> None:
    size = method().encoder.shapes[-1][0]
    widths = [
        [m.weight.shape for m in learner.projector.modules() if isinstance(m, torch.nn.Linear)]
        for learner in (method(), method(hidden=(5, 7)), method(hidden=()))
    ]
    assert widths == [[(size, size), (6, size)], [(5, size), (7, 5), (6, 7)], [(6, size)]]
    assert len(method(last_norm=False).projector.layers) == len(method().projector.layers) - 1


def test_views_are_those_of_the_data_set_with_the_papers_colours() -> None:
    ops = ({"op": "random_resized_crop", "scale": [0.3, 1.0]},)
    (small,), (large,) = (default_views("simclr", ops, size, {}) for size in (32, 96))
    assert (small.count, small.size, large.count, large.size) == (2, 32, 2, 96)
    jitters = [next(op for op in group.augment if op["op"] == "color_jitter") for group in (small, large)]
    assert [(op["brightness"], op["hue"], op["p"]) for op in jitters] == [(0.4, 0.1, 0.8), (0.8, 0.2, 0.8)]
    assert [op["op"] for op in small.augment] == ["random_resized_crop", "color_jitter", "random_grayscale"]
    assert large.augment[-1] == {"op": "gaussian_blur", "p": 0.5}
    assert batch_requirements("simclr", {}) == BatchRequirements(views=2)
    assert METHODS["simclr"] is SimClr


def test_a_class_token_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match=r"^pool: 'cls' needs a class token, and convnet has none"):
        method(pool="cls")
