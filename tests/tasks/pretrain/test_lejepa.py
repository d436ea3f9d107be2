"""LeJEPA: invariance and SIGReg over the images of all workers, along directions of (seed, step)."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from firstlight.tasks.joint_embedding.sigreg import draw_directions
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.pretrain import METHODS, batch_requirements, default_views, list_method_warnings
from firstlight.tasks.pretrain.lejepa import LeJepa
from firstlight.tasks.pretrain.method import BatchRequirements, TrainingInfo
from tests.support import gradient_cache
from tests.support import references_lejepa as references
from tests.support.batches import image_batch
from tests.support.gloo import Pool
from tests.support.learners import build_method
from tests.support.single_precision import assert_loss_is_single_precision
from tests.support.two_workers import assert_workers_equal_one

batch = partial(image_batch, dtype=torch.float64, views=3)

INFO = TrainingInfo(size=96, epochs=3, seed=7)
SMALL: dict[str, Any] = {"dim": 3, "hidden": (6,), "directions": 5}


def draw_embeddings(count: int, views: int, dim: int, seed: int = 0) -> Tensor:
    """Embeddings of images whose views are near each other, and whose mean is not 0."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, dim, generator=rng, dtype=torch.float64)
    return 1.5 * images + 0.3 + 0.4 * torch.randn(count, views, dim, generator=rng, dtype=torch.float64)


def method(norm: str = "sync", dtype: torch.dtype = torch.float64, **options: Any) -> LeJepa:
    settings = {**SMALL, "norm": norm, "global_views": 2, "local_views": 1, **options}
    return build_method(LeJepa, INFO, {"norm": norm}, dtype=dtype, **settings)


@pytest.mark.parametrize("distance", ["mean", "sum"])
@pytest.mark.parametrize(("knots", "t_max"), [(17, 3.0), (9, 5.0)])
@pytest.mark.parametrize(("count", "views", "dim"), [(2, 3, 3), (7, 4, 5), (5, 2, 1)])
def test_loss_is_algorithm_2(count: int, views: int, dim: int, knots: int, t_max: float, distance: str) -> None:
    learner = method(
        coefficient=0.2, local_views=views - 2, knots=knots, t_max=t_max, distance=distance, dim=dim, directions=4
    )
    learner.begin_step(11)
    embeddings = draw_embeddings(count, views, dim)
    directions = draw_directions(INFO.seed, 11, 4, embeddings)
    invariance, sigreg = references.lejepa_terms(embeddings, 2, directions, 2 * knots - 1, t_max, distance)
    told = learner.loss((embeddings,), batch(count))
    assert float(told["invariance"]) == pytest.approx(invariance, rel=1e-11, abs=1e-14)
    assert float(told["sigreg"]) == pytest.approx(sigreg, rel=1e-11)
    assert float(told["loss"]) == pytest.approx(0.8 * invariance + 0.2 * sigreg, rel=1e-11)


@pytest.mark.parametrize("distance", ["mean", "sum"])
def test_gradcheck(distance: str) -> None:
    learner, seen = method(distance=distance, knots=5, coefficient=0.3), batch(4)
    embeddings = draw_embeddings(4, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: learner.loss((x,), seen)["loss"], embeddings)


@pytest.mark.parametrize("local_views", [1, 2])
def test_loss_is_lightlys(local_views: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`LeJEPALoss` with its default settings, which are the method's, along the same directions."""
    loss = pytest.importorskip("lightly.loss.lejepa_loss")
    learner, embeddings = (
        method(local_views=local_views, dim=6, directions=1024),
        draw_embeddings(9, 2 + local_views, 6),
    )
    directions = draw_directions(INFO.seed, 0, 1024, embeddings)
    monkeypatch.setattr(loss.SIGReg, "_generate_unit_vectors", lambda *_, **__: directions)
    views = embeddings.transpose(0, 1)
    # Its points and weights are in single precision.
    theirs = loss.LeJEPALoss()(local_proj=views[2:], global_proj=views[:2])
    torch.testing.assert_close(learner.loss((embeddings,), batch(9))["loss"], theirs, rtol=1e-6, atol=0)


def test_every_step_has_directions_of_its_own() -> None:
    learner, embeddings = method(), draw_embeddings(6, 3, 3)
    found = {}
    for step in (0, 1, 5, 1):
        learner.begin_step(step)
        value = float(learner.loss((embeddings,), batch(6))["sigreg"])
        assert found.setdefault(step, value) == value
    assert len(set(found.values())) == 3


def test_views_of_one_size_pass_the_encoder_together_and_all_the_projector() -> None:
    learner = method(norm="batch").train()
    large, small = (image_batch(torch.arange(4), size=size, views=2, dtype=torch.float64) for size in (12, 8))
    seen = Batch(large.ids, large.rows, large.labels, (*large.views, small.views[0]), large.passes)
    pooled = [learner.encoder(torch.cat(views))[-1].mean((2, 3)) for views in (large.views, small.views[:1])]
    expected = learner.projector(torch.cat(pooled)).unflatten(0, (3, 4)).transpose(0, 1)
    (found,) = learner.embed(seen)
    assert found.shape == (4, 3, 3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("distance", ["mean", "sum"])
def test_two_workers_equal_one(pool: Pool, distance: str) -> None:
    assert_workers_equal_one(pool, partial(method, distance=distance), batch(12), batch(12), atol=1e-10)


def test_three_workers_equal_one(pool3: Pool) -> None:
    assert_workers_equal_one(pool3, method, batch(12), atol=1e-10)


def test_a_batch_embedded_in_parts_has_the_loss_of_the_whole() -> None:
    whole, parted = (method(norm="group", hidden=(64,)).train() for _ in range(2))
    gradient_cache.assert_parts_equal_whole(whole, parted, batch(12), 4)


def test_loss_is_single_precision_under_autocast() -> None:
    assert_loss_is_single_precision(method(dtype=torch.float32), batch(6, dtype=torch.float32))


def test_every_network_is_trained() -> None:
    vit = {"name": "timm", "model": "test_vit", "img_size": 8, "patch_size": 4}
    for learner in (method(), LeJepa(Encoder(vit, 8), INFO, local_views=1, **SMALL).double()):
        learner(batch(4))["loss"].backward()
        assert not [name for name, p in learner.named_parameters() if p.requires_grad and p.grad is None]
        assert all(p.grad is not None and p.grad.any() for p in learner.projector.parameters())


def test_the_projectors_last_layer_alone_has_a_bias() -> None:
    layers = [m for m in method(norm="batch").projector.modules() if isinstance(m, nn.Linear)]
    assert [layer.bias is not None for layer in layers] == [False, True]


def test_training_spreads_equal_embeddings() -> None:
    """From nearly equal embeddings, SIGReg alone gives every dimension a deviation near 1."""
    learner = method(coefficient=1.0, local_views=0, dim=3, directions=64)
    embeddings = (0.01 * draw_embeddings(128, 2, 3)).requires_grad_()
    optimiser = torch.optim.Adam([embeddings], lr=0.05)
    for step in range(150):
        learner.begin_step(step)
        optimiser.zero_grad()
        learner.loss((embeddings,), batch(1))["loss"].backward()
        optimiser.step()
    covariance = torch.cov(embeddings.detach()[:, 0].T)
    torch.testing.assert_close(covariance, torch.eye(3).double(), rtol=0, atol=0.2)


def test_views_are_two_sizes_with_the_authors_ops() -> None:
    ops = ({"op": "random_resized_crop", "scale": [0.08, 1.0], "ratio": [0.8, 1.2]}, {"op": "horizontal_flip"})
    large, small = default_views("lejepa", ops, 224, {})
    assert (large.count, large.size, small.count, small.size) == (2, 224, 6, 96)
    assert [op["op"] for op in large.augment][2:] == ["color_jitter", "random_grayscale", "gaussian_blur", "solarize"]
    assert large.augment[1:] == small.augment[1:]
    assert (large.augment[0]["scale"], small.augment[0]["scale"]) == ((0.3, 1.0), (0.05, 0.3))
    assert large.augment[0]["ratio"] == small.augment[0]["ratio"] == [0.8, 1.2]
    assert [op["p"] for op in large.augment[4:]] == [0.5, 0.2]


def test_small_images_are_neither_blurred_nor_solarised() -> None:
    large, small = default_views("lejepa", ({"op": "random_shift", "padding": 2},), 32, {})
    assert [op["op"] for op in large.augment] == ["random_resized_crop", "color_jitter", "random_grayscale"]
    assert (small.size, small.augment[0]["scale"]) == (16, (0.2, 0.4))


def test_without_small_views_the_crop_of_the_data_set_stays() -> None:
    ops = ({"op": "random_resized_crop", "scale": [0.2, 1.0]},)
    (group,) = default_views("lejepa", ops, 32, {"global_views": 4, "local_views": 0})
    assert (group.count, group.size, group.augment[0]) == (4, 32, ops[0])
    assert batch_requirements("lejepa", {"global_views": 4, "local_views": 0}) == BatchRequirements(views=4)
    assert METHODS["lejepa"] is LeJepa


def test_one_view_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^local_views: 0 is not valid with global_views: 1, .*; valid: 1 to 30$"):
        method(global_views=1, local_views=0)


def test_a_class_token_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match=r"^pool: 'cls' needs a class token, and convnet has none"):
        method(pool="cls")


def test_no_sigreg_is_warned_of() -> None:
    assert list_method_warnings("lejepa", {}) == ()
    (warning,) = list_method_warnings("lejepa", {"coefficient": 0.0})
    assert warning.startswith("coefficient: 0 leaves SIGReg out")
