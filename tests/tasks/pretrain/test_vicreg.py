"""VICReg: its three terms, over the images of all workers."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.pretrain import METHODS, batch_requirements, default_views
from firstlight.tasks.pretrain.method import BatchRequirements, TrainingInfo
from firstlight.tasks.pretrain.vicreg import VicReg, penalise_covariance, penalise_variance
from tests.support import gradient_cache
from tests.support import references_contrastive as references
from tests.support.batches import image_batch
from tests.support.gloo import Pool
from tests.support.learners import build_method
from tests.support.single_precision import assert_loss_is_single_precision
from tests.support.two_workers import assert_workers_equal_one

batch = partial(image_batch, dtype=torch.float64, views=2)

INFO = TrainingInfo(size=96, epochs=3, seed=7)
VARIANTS = pytest.mark.parametrize("variant", ["reference", "paper"])


def draw_embeddings(count: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings of two views with correlated dimensions, some of which spread by more than 1 and some by less."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=rng, dtype=torch.float64)
    first, noise = torch.randn(2, count, dim, generator=rng, dtype=torch.float64)
    scale = torch.linspace(0.1, 2.0, dim, dtype=torch.float64)
    return first @ mixing * scale + 3.0, (first + 0.5 * noise) @ mixing * scale


def method(norm: str = "sync", dtype: torch.dtype = torch.float64, **options: Any) -> VicReg:
    return build_method(VicReg, INFO, {"norm": norm}, dtype=dtype, **{"dim": 6, "norm": norm, **options})


def weigh_terms(learner: VicReg, first: Tensor, second: Tensor) -> float:
    invariance, variance, covariance = references.vicreg_terms(first, second)
    weights = learner.weights
    if learner.variant == "reference":
        invariance, variance = invariance / first.shape[1], variance / 2
    return weights[0] * invariance + weights[1] * variance + weights[2] * covariance


@VARIANTS
@pytest.mark.parametrize(("count", "dim"), [(2, 3), (9, 5), (5, 11)])
def test_the_loss_is_equation_6(count: int, dim: int, variant: str) -> None:
    first, second = draw_embeddings(count, dim)
    learner = method(variant=variant, invariance=7.0, variance=11.0, covariance=3.0)
    told = learner.loss((first, second), batch(count))
    assert float(told["loss"]) == pytest.approx(weigh_terms(learner, first, second), rel=1e-12)
    terms = [float(told[name]) for name in ("invariance", "variance", "covariance")]
    assert float(told["loss"]) == pytest.approx(7 * terms[0] + 11 * terms[1] + 3 * terms[2])
    assert all(term > 0 for term in terms)


def test_terms_are_those_of_the_paper() -> None:
    first, second = draw_embeddings(9, 5)
    _, variance, covariance = references.vicreg_terms(first, second)
    assert float(penalise_variance(first) + penalise_variance(second)) == pytest.approx(variance, rel=1e-12)
    assert float(penalise_covariance(first) + penalise_covariance(second)) == pytest.approx(covariance, rel=1e-12)


def test_only_deviations_below_one_cost() -> None:
    wide = torch.tensor([[-2.0, 1.5], [2.0, -1.5]], dtype=torch.float64)
    assert float(penalise_variance(wide)) == 0.0
    assert float(penalise_variance(torch.ones(4, 3, dtype=torch.float64))) == pytest.approx(0.99), "1 - sqrt(eps)"


@VARIANTS
def test_gradcheck(variant: str) -> None:
    learner, seen = method(variant=variant), batch(5)
    views = [view.requires_grad_() for view in draw_embeddings(5, 4)]
    assert torch.autograd.gradcheck(lambda a, b: learner.loss((a, b), seen)["loss"], views)


def test_the_reference_loss_is_lightlys_of_one_process() -> None:
    """`VICRegLoss` with its default weights, which are the method's."""
    theirs = pytest.importorskip("lightly.loss").VICRegLoss()
    first, second = draw_embeddings(11, 5, seed=3)
    torch.testing.assert_close(
        method().loss((first, second), batch(11))["loss"], theirs(first, second), rtol=1e-12, atol=0
    )


def test_each_view_passes_the_networks_on_its_own() -> None:
    learner, seen = method(norm="batch").train(), batch(6)
    found = learner.embed(seen)
    for embedding, view in zip(found, seen.views, strict=True):
        alone = learner.expander(learner.encoder(view)[-1].mean((2, 3)))
        torch.testing.assert_close(embedding, alone, rtol=1e-12, atol=0)
    assert found[0].shape == (6, 6)


def test_views_may_differ_in_size() -> None:
    small, large = (image_batch(torch.arange(4), size=size, dtype=torch.float64) for size in (8, 12))
    seen = Batch(small.ids, small.rows, small.labels, (large.views[0], small.views[0]), small.passes)
    assert method()(seen)["loss"].isfinite()


@VARIANTS
def test_two_workers_equal_one(pool: Pool, variant: str) -> None:
    assert_workers_equal_one(pool, partial(method, variant=variant), batch(12), batch(12), atol=1e-10)


def test_three_workers_equal_one(pool3: Pool) -> None:
    assert_workers_equal_one(pool3, method, batch(12), atol=1e-10)


def test_a_batch_embedded_in_parts_has_the_loss_of_the_whole() -> None:
    whole, parted = (method(norm="group", hidden=(64,)).train() for _ in range(2))
    gradient_cache.assert_parts_equal_whole(whole, parted, batch(12), 4)


def test_loss_is_single_precision_under_autocast() -> None:
    assert_loss_is_single_precision(method(dtype=torch.float32), batch(6, dtype=torch.float32))


def test_every_network_is_trained() -> None:
    vit = {"name": "timm", "model": "test_vit", "img_size": 8, "patch_size": 4}
    for learner in (method(), VicReg(Encoder(vit, 8), INFO, dim=6).double()):
        learner(batch(4))["loss"].backward()
        assert all(p.grad is not None and p.grad.any() for p in learner.expander.parameters())
        assert next(learner.encoder.parameters()).grad is not None


def test_expander_has_three_layers_by_default() -> None:
    size = method().encoder.shapes[-1][0]
    widths = [
        [m.weight.shape for m in learner.expander.modules() if isinstance(m, torch.nn.Linear)]
        for learner in (method(), method(hidden=(5,)))
    ]
    assert widths == [[(6, size), (6, 6), (6, 6)], [(5, size), (6, 5)]]


def test_large_views_differ_as_in_the_authors_code() -> None:
    ops = ({"op": "random_resized_crop", "scale": [0.3, 1.0]},)
    first, second = default_views("vicreg", ops, 96, {})
    assert (first.count, second.count, first.size) == (1, 1, 96)
    assert [op["op"] for op in second.augment][-2:] == ["gaussian_blur", "solarize"]
    assert first.augment[-1] == {"op": "gaussian_blur", "p": 1.0}
    assert batch_requirements("vicreg", {}) == BatchRequirements(views=2)
    assert METHODS["vicreg"] is VicReg


def test_a_class_token_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match=r"^pool: 'cls' needs a class token, and convnet has none"):
        method(pool="cls")
