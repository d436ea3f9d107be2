"""BYOL: the loss between two views, and a target that follows the online network."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from firstlight.tasks.collective import rank, world_size
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.pretrain import METHODS, batch_requirements, default_views
from firstlight.tasks.pretrain.byol import Byol, measure_spread, regress_views
from firstlight.tasks.pretrain.method import BatchRequirements, TrainingInfo
from tests.support import gradient_cache
from tests.support import references_contrastive as references
from tests.support.batches import image_batch
from tests.support.gloo import Pool
from tests.support.learners import build_method
from tests.support.single_precision import assert_loss_is_single_precision
from tests.support.two_workers import assert_workers_equal_one, split_batch

batch = partial(image_batch, dtype=torch.float64, views=2)

STEPS = 4
INFO = TrainingInfo(size=96, epochs=3, seed=7, steps=STEPS)


def draw_vectors(count: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    first, second, third, fourth = torch.randn(4, count, dim, generator=rng, dtype=torch.float64)
    return first, second, third, fourth


def method(norm: str = "sync", dtype: torch.dtype = torch.float64, **options: Any) -> Byol:
    settings = {"dim": 6, "hidden": (64,), "norm": norm, **options}
    return build_method(Byol, INFO, {"norm": norm}, dtype=dtype, **settings)


@pytest.mark.parametrize(("count", "dim"), [(1, 3), (5, 4), (17, 9)])
def test_the_loss_is_equation_2_of_both_views(count: int, dim: int) -> None:
    a, b, c, d = draw_vectors(count, dim)
    assert float(regress_views((a, b), (c, d))) == pytest.approx(references.byol_loss((a, b), (c, d)), rel=1e-12)
    assert float(regress_views((a, b), (b, a))) == pytest.approx(0.0, abs=1e-12)


def test_gradcheck() -> None:
    a, b, c, d = draw_vectors(4, 3)
    predictions = (a.requires_grad_(), b.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, y: regress_views((x, y), (c, d)), predictions)


def test_the_loss_is_lightlys() -> None:
    """2 + 2 `NegativeCosineSimilarity` for each of the two pairs."""
    theirs = pytest.importorskip("lightly.loss").NegativeCosineSimilarity()
    a, b, c, d = draw_vectors(11, 5, seed=3)
    wanted = (2 + 2 * theirs(a, d)) + (2 + 2 * theirs(b, c))
    torch.testing.assert_close(regress_views((a, b), (c, d)), wanted, rtol=1e-12, atol=0)


def test_spread_is_one_on_the_sphere_and_zero_after_a_collapse() -> None:
    even = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))
    assert float(measure_spread(even)) == pytest.approx(1.0, abs=0.01)
    assert float(measure_spread(torch.ones(5, 8, dtype=torch.float64))) == pytest.approx(0.0, abs=1e-12)


def test_the_method_predicts_the_targets_of_the_other_view() -> None:
    learner, seen = method(), batch(7)
    first, second, *targets = learner.embed(seen)
    wanted = references.byol_loss((first, second), (targets[0], targets[1]))
    assert float(learner(seen)["loss"].detach()) == pytest.approx(wanted, rel=1e-12)
    pooled = [learner.target_encoder(view)[-1].mean((2, 3)) for view in seen.views]
    for target, features in zip(targets, pooled, strict=True):
        torch.testing.assert_close(target, learner.target_projector(features))
        assert not target.requires_grad


def test_each_view_passes_the_networks_on_its_own() -> None:
    learner, seen = method(norm="batch").train(), batch(6)
    for prediction, view in zip(learner.embed(seen)[:2], seen.views, strict=True):
        features = learner.encoder(view)[-1].mean((2, 3))
        torch.testing.assert_close(prediction, learner.predictor(learner.projector(features)), rtol=1e-12, atol=0)


def test_no_gradient_reaches_the_target() -> None:
    learner = method()
    outputs = tuple(output.detach().requires_grad_() for output in learner.embed(batch(6)))
    learner.loss(outputs, batch(6))["loss"].backward()
    assert [output.grad is not None for output in outputs] == [True, True, False, False]
    frozen = [*learner.target_encoder.parameters(), *learner.target_projector.parameters()]
    assert not any(parameter.requires_grad for parameter in frozen)
    trained = {id(p) for _, group in learner.parameter_groups() for p in group}
    assert not trained & {id(p) for p in frozen}


@pytest.mark.parametrize(("start", "end"), [(0.9, 1.0), (0.99, 0.99), (0.5, 0.8)])
def test_momentum_follows_a_cosine(start: float, end: float) -> None:
    learner = method(momentum=start, momentum_end=end)
    for step in (0, 3, 1):
        learner.begin_step(step)
        assert learner.momentum == pytest.approx(references.cosine_momentum(start, end, step, STEPS), rel=1e-12)
    assert method(momentum=start, momentum_end=end).momentum == pytest.approx(start)


def train_steps(norm: str, count: int) -> dict[str, Tensor]:
    """Takes steps of SGD on this worker's part of each batch. Returns all weights and buffers."""
    learner = method(norm=norm, momentum=0.6).train()
    model = DistributedDataParallel(learner) if world_size() > 1 else learner
    optimizer = torch.optim.SGD([p for p in learner.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for step in range(count):
        learner.begin_step(step)
        optimizer.zero_grad()
        whole = image_batch(torch.arange(12) + 12 * step, views=2, dtype=torch.float64)
        model(split_batch(whole, world_size())[rank()])["loss"].backward()
        optimizer.step()
        learner.end_step()
    return {name: value.clone() for name, value in learner.state_dict().items()}


def test_target_is_the_average_of_online_weights() -> None:
    states = [train_steps("group", count) for count in range(STEPS)]
    for name in ("encoder", "projector"):
        pairs = [
            (key, key.replace(f"target_{name}.network.", f"{name}."))
            for key in states[0]
            if key.startswith(f"target_{name}.network.")
        ]
        assert pairs
        for target, online in pairs:
            wanted = states[0][online].clone()
            for step in range(STEPS - 1):
                momentum = references.cosine_momentum(0.6, 1.0, step, STEPS)
                wanted = momentum * wanted + (1 - momentum) * states[step + 1][online]
            torch.testing.assert_close(states[-1][target], wanted, rtol=1e-12, atol=1e-14)
    changed = "predictor.layers.0.weight"
    assert not torch.equal(states[0][changed], states[-1][changed])


def test_targets_of_two_workers_are_those_of_one_after_steps(pool: Pool) -> None:
    one = train_steps("sync", STEPS)
    for state in pool.run(train_steps, "sync", STEPS):
        torch.testing.assert_close(state, one, rtol=1e-8, atol=1e-10)


def test_two_workers_equal_one(pool: Pool) -> None:
    assert_workers_equal_one(pool, method, batch(12), batch(12))


def test_three_workers_equal_one(pool3: Pool) -> None:
    assert_workers_equal_one(pool3, partial(method, exported="target"), batch(12))


def test_a_batch_embedded_in_parts_has_the_loss_of_the_whole() -> None:
    whole, parted = (method(norm="group").train() for _ in range(2))
    seen = batch(12)
    whole(seen)["loss"].backward()
    assert all(p.grad is None for p in whole.target_encoder.parameters())
    whole.zero_grad()
    gradient_cache.assert_parts_equal_whole(whole, parted, seen, 4)


def test_loss_is_single_precision_under_autocast() -> None:
    assert_loss_is_single_precision(method(dtype=torch.float32), batch(6, dtype=torch.float32))


def test_a_vit_and_its_target_are_trained() -> None:
    vit = {"name": "timm", "model": "test_vit", "img_size": 8, "patch_size": 4}
    learner = Byol(Encoder(vit, 8), INFO, dim=6, hidden=(9,), momentum=0.5).double()
    before = learner.target_encoder.network.state_dict()["stages.net.model.cls_token"].clone()
    learner(batch(4))["loss"].backward()
    token = learner.encoder.get_parameter("stages.net.model.cls_token")
    assert token.grad is not None
    with torch.no_grad():
        token += token.grad
    learner.end_step()
    assert not torch.equal(learner.target_encoder.network.state_dict()["stages.net.model.cls_token"], before)


def test_exported_encoder_is_the_one_asked_for() -> None:
    online, target = method(), method(exported="target")
    assert online.exported_encoder() is online.encoder
    assert target.exported_encoder() is target.target_encoder.network


def test_large_views_differ_as_in_table_6_and_small_ones_are_alike() -> None:
    ops = ({"op": "random_resized_crop", "scale": [0.3, 1.0]},)
    first, second = default_views("byol", ops, 96, {})
    assert (first.count, second.count, first.size) == (1, 1, 96)
    assert first.augment[-1] == {"op": "gaussian_blur", "p": 1.0}
    assert list(second.augment[-2:]) == [{"op": "gaussian_blur", "p": 0.1}, {"op": "solarize", "p": 0.2}]
    small = default_views("byol", ops, 32, {})
    assert small[0].augment == small[1].augment
    assert small[0].augment[1]["saturation"] == 0.2
    assert batch_requirements("byol", {}) == BatchRequirements(views=2)
    assert METHODS["byol"] is Byol


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^momentum_end: 0\.9 is below momentum: 0\.99; valid: 0\.99 to 1"):
        method(momentum=0.99, momentum_end=0.9)
    with pytest.raises(ValueError, match=r"^pool: 'cls' needs a class token, and convnet has none"):
        method(pool="cls")
