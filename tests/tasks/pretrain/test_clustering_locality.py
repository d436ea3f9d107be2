import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from firstlight.tasks.pretrain import batch_requirements, list_method_warnings
from firstlight.tasks.pretrain.clustering_locality import (
    ClusteringLocality,
    batch_entropy,
    count_used_clusters,
    locality_penalty,
    mean_entropy,
)
from firstlight.tasks.pretrain.method import TrainingInfo
from tests.support import gradient_cache, references
from tests.support.batches import batch_of_images, image_batch, unevenly_labelled
from tests.support.gloo import Pool
from tests.support.learners import build_method
from tests.support.two_workers import assert_workers_equal_one, split_batch

batch = partial(image_batch, size=16, dtype=torch.float64, labels=unevenly_labelled)

VARIANTS: dict[str, dict[str, Any]] = {
    "all terms": {"beta": 0.7, "gamma": 0.3},
    "relu": {"beta": 0.7, "gamma": 0.3, "cam": "relu"},
    "unsupervised": {"beta": 0.7, "gamma": 0.3, "supervised": False, "clusters": 9},
    "cross-entropy only": {"alpha": 0.0, "beta": 0.0, "gamma": 0.0},
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def method(
    norm: str = "group", dtype: torch.dtype = torch.float64, classes: int = 5, **options: Any
) -> ClusteringLocality:
    """The method on an encoder whose last map has 8 channels and 4 x 4 positions."""
    info = TrainingInfo(size=96, epochs=3, seed=7, classes=classes)
    return build_method(ClusteringLocality, info, {"norm": norm}, 16, dtype=dtype, **options)


def test_the_entropies_are_equations_1_and_2() -> None:
    logits = 3.0 * normal(9, 4)
    of_each, of_mean = references.clustering_entropies(logits.softmax(1))
    assert float(mean_entropy(logits)) == pytest.approx(of_each, rel=1e-10)
    assert float(batch_entropy(logits)) == pytest.approx(of_mean, rel=1e-10)


@given(st.integers(1, 12), st.integers(2, 6), st.integers(0, 1000), st.floats(0.0, 50.0))
def test_entropies_lie_between_0_and_log_c_and_that_of_the_mean_is_larger(
    n: int, classes: int, seed: int, scale: float
) -> None:
    logits = scale * normal(n, classes, seed=seed)
    of_each, of_mean = float(mean_entropy(logits)), float(batch_entropy(logits))
    assert -1e-12 <= of_each <= of_mean + 1e-12
    assert of_mean <= math.log(classes) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropies_are_finite_where_a_class_has_probability_0(dtype: torch.dtype) -> None:
    logits = torch.tensor([[5e3, 0.0, -5e3], [4e3, -1e3, 0.0]], dtype=dtype, requires_grad=True)
    assert float(logits.softmax(1).detach().mean(0)[2]) == 0.0
    for loss in (mean_entropy(logits), batch_entropy(logits)):
        assert float(loss.detach()) == 0.0
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.equal(gradient, torch.zeros_like(logits))


def test_used_clusters_are_counted_by_the_most_probable_class() -> None:
    logits = torch.tensor([[5.0, 0.0, 4.9, 0.0], [0.0, 0.1, 0.0, 0.0], [1.0, 0.0, 0.0, -9.0]])
    assert float(count_used_clusters(logits)) == 2.0
    even = torch.zeros(6, 4, dtype=torch.float64)
    assert float(batch_entropy(even)) == pytest.approx(math.log(4)), "the largest entropy"
    assert float(count_used_clusters(even)) == 1.0, "and no clusters"


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ({"supervised": False, "alpha": 0.8, "beta": 0.1}, True),
        ({"supervised": False, "clusters": 9}, True),  # the defaults
        ({"supervised": False, "alpha": 0.8, "beta": 0.8}, False),
        ({"supervised": False, "alpha": 0.8, "beta": 1.0}, False),
        ({"supervised": False, "alpha": 0.0, "beta": 0.0}, False),
        ({"alpha": 0.8, "beta": 0.1}, False),
        ({}, False),
    ],
)
def test_smaller_beta_than_alpha_without_labels_is_warned_of(options: dict[str, Any], warns: bool) -> None:
    lines = list_method_warnings("clustering_locality", options)
    assert len(lines) == warns
    for line in lines:
        assert line.startswith("beta: 0.1 is less than alpha: 0.8, and no label is learned from")
        assert "\n" not in line


@pytest.mark.parametrize(("h", "w"), [(4, 4), (3, 5), (1, 6), (1, 1)])
def test_the_locality_is_equation_7_for_maps_that_are_not_symmetric(h: int, w: int) -> None:
    maps = normal(3, h, w)
    for found, activation in zip(locality_penalty(maps), maps, strict=True):
        assert float(found) == pytest.approx(sum(references.locality_families(activation)), rel=1e-10)


def test_locality_sums_all_four_families() -> None:
    """On this map each of the four families differs; the last half-space of each is the whole map."""
    activation = torch.zeros(1, 4, 4, dtype=torch.float64)
    activation[0, 0, 0] = activation[0, 1, 2] = 1.0
    both = math.sqrt(2.0)
    left_right, right_left = 1 + 1 + both + both, 0 + 1 + 1 + both
    top_bottom, bottom_top = 1 + both + both + both, 0 + 0 + 1 + both
    assert references.locality_families(activation[0]) == pytest.approx(
        [left_right, right_left, top_bottom, bottom_top], rel=1e-12
    )
    assert float(locality_penalty(activation)[0]) == pytest.approx(
        left_right + right_left + top_bottom + bottom_top, rel=1e-12
    )


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_single_position_has_least_penalty_of_equal_norms(h: int, w: int, seed: int) -> None:
    maps = normal(1, h, w, seed=seed)
    least = (w + 1 + h + 1) * float(maps.norm())
    assert float(locality_penalty(maps)[0]) >= least * (1 - 1e-12)
    single = torch.zeros_like(maps)
    single.view(-1)[seed % (h * w)] = maps.norm()
    assert float(locality_penalty(single)[0]) == pytest.approx(least, rel=1e-12)


@given(st.integers(0, 1000))
def test_locality_is_symmetric_under_flips_and_transposition(seed: int) -> None:
    maps = normal(2, 3, 5, seed=seed)
    for turned in (maps.flip(1), maps.flip(2), maps.mT, -maps):
        torch.testing.assert_close(locality_penalty(turned), locality_penalty(maps), rtol=1e-12, atol=0)


def test_gradcheck() -> None:
    logits, maps = normal(4, 3).requires_grad_(), normal(2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(mean_entropy, (logits,))
    assert torch.autograd.gradcheck(batch_entropy, (logits,))
    assert torch.autograd.gradcheck(locality_penalty, (maps,))


def test_empty_maps_have_penalty_and_gradient_0() -> None:
    maps = torch.zeros(2, 3, 4, requires_grad=True)
    penalty = locality_penalty(maps)
    penalty.sum().backward()
    assert torch.equal(penalty.detach(), torch.zeros(2))
    assert torch.equal(maps.grad, torch.zeros_like(maps))  # type: ignore[arg-type]


def test_empty_half_spaces_do_not_change_other_gradients() -> None:
    maps = torch.zeros(1, 4, 4, dtype=torch.float64)
    maps[0, 1, 2] = -3.0  # in 2 of the half-spaces from the left, 3 from the right, 3 from the top, 2 from the bottom
    maps.requires_grad_()
    locality_penalty(maps).sum().backward()
    expected = torch.zeros_like(maps)
    expected[0, 1, 2] = -10.0
    torch.testing.assert_close(maps.grad, expected)


def test_the_loss_is_equation_8() -> None:
    learner, b = method(**VARIANTS["all terms"]), batch(torch.arange(24))
    losses = {name: float(value.detach()) for name, value in learner(b).items()}
    logits, maps = (x.detach() for x in learner.embed(b))
    of_each, of_mean = references.clustering_entropies(logits.softmax(1))
    assert losses["mean_entropy"] == pytest.approx(of_each, rel=1e-10)
    assert losses["batch_entropy"] == pytest.approx(of_mean, rel=1e-10)
    assert losses["cross_entropy"] == pytest.approx(
        references.labelled_cross_entropy(logits.softmax(1), b.labels.tolist()), rel=1e-10
    )
    assert losses["locality"] == pytest.approx(sum(sum(references.locality_families(m)) for m in maps) / 24, rel=1e-10)
    expected = (
        losses["cross_entropy"]
        + 0.8 * losses["mean_entropy"]
        - 0.7 * losses["batch_entropy"]
        + 0.3 * losses["locality"]
    )
    assert losses["loss"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("cam", ["raw", "relu"])
def test_the_map_is_the_class_activation_map_of_the_most_probable_class(cam: str) -> None:
    """Averaged over positions, the weighted channels are the class's logit without its bias (Zhou et al.)."""
    learner, b = method(cam=cam), batch(torch.arange(6))
    with torch.no_grad():
        logits, maps = learner.embed(b)
        features = learner.encoder(b.views[0])[-1]
    weights, bias = learner.classifier.weight.detach(), learner.classifier.bias.detach()
    for t in range(6):
        best = int(logits[t].argmax())
        for y in range(4):
            for x in range(4):
                expected = sum(float(weights[best, k] * features[t, k, y, x]) for k in range(8))
                assert float(maps[t, y, x]) == pytest.approx(
                    max(expected, 0.0) if cam == "relu" else expected, rel=1e-10, abs=1e-14
                )
        if cam == "raw":
            assert float(maps[t].mean()) == pytest.approx(float(logits[t, best] - bias[best]), rel=1e-10)


def test_the_locality_reaches_the_weights_and_the_features() -> None:
    learner = method()
    _, maps = learner.embed(batch(torch.arange(6)))
    locality_penalty(maps).mean().backward()
    assert learner.classifier.weight.grad is not None
    assert learner.classifier.weight.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learner.encoder.parameters())


def test_image_grid_shows_class_activation_before_and_after_training() -> None:
    learner, seen = method().eval(), batch(torch.arange(4))
    (picture,) = learner.image_grids(seen)
    image, evidence = picture.rows
    assert torch.equal(image.images, seen.views[0])
    assert image.maps is None
    assert (image.untrained, evidence.untrained) == (False, True)
    cam = learner.embed(seen)[1].detach().float()
    assert evidence.maps is not None
    torch.testing.assert_close(evidence.maps.amax((1, 2)), torch.ones(4))
    assert torch.equal(evidence.maps.flatten(1).argmax(1), cam.flatten(1).argmax(1))


def test_without_supervision_labels_do_not_matter() -> None:
    learner, first, second = method(**VARIANTS["unsupervised"]), batch(torch.arange(12)), batch(torch.arange(12))
    second.labels.zero_()
    losses = learner(first)
    assert torch.equal(losses["loss"], learner(second)["loss"])
    assert losses.keys() == {"loss", "mean_entropy", "batch_entropy", "locality", "clusters_used"}
    assert learner.classifier.out_features == 9
    assert not batch_requirements("clustering_locality", VARIANTS["unsupervised"]).labels
    assert batch_requirements("clustering_locality", {}).labels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 0, "supervised": False}, "^clusters: null is not valid, .* no classes"),
        ({"classes": 0, "clusters": 4}, "^supervised: true needs labels"),
        ({"classes": 5, "clusters": 4}, "^clusters: 4 is less than the 5 classes"),
    ],
)
def test_wrong_parameters_raise_with_their_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**options)


def test_clusters_may_be_more_than_classes_and_are_as_many_unless_given() -> None:
    assert method().classifier.out_features == 5
    assert method(clusters=8).classifier.out_features == 8
    assert method(clusters=4, supervised=False).classifier.out_features == 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_does_not_depend_on_the_order_of_the_batch(variant: str) -> None:
    learner, ids = method(**VARIANTS[variant]), torch.arange(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    first, second = learner(batch(ids)), learner(batch(ids[order]))
    for name in first:
        assert float(first[name].detach()) == pytest.approx(float(second[name].detach()), rel=1e-10)


@pytest.mark.fault(38, "zeros, equal images, huge values: Clustering and Locality")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("images", ["constant", "equal"])
def test_constant_and_equal_images_have_finite_losses(variant: str, images: str) -> None:
    learner = method(dtype=torch.float32, **VARIANTS[variant])
    pixels = torch.zeros(8, 3, 16, 16) if images == "constant" else torch.rand(1, 3, 16, 16).expand(8, -1, -1, -1)
    losses = learner(batch_of_images(pixels))
    losses["loss"].backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in learner.parameters())


def test_the_step_is_in_single_precision_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        losses = method(dtype=torch.float32)(batch(torch.arange(12), dtype=torch.float32))
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_embedded_in_parts_has_gradient_of_whole(variant: str) -> None:
    gradient_cache.assert_parts_equal_whole(
        method(**VARIANTS[variant]), method(**VARIANTS[variant]), batch(torch.arange(24)), 8
    )


@pytest.mark.parametrize("norm", ["group", "sync"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("workers", "size", "labelled"), [("pool", 64, [6, 4]), ("pool3", 48, [6, 0, 4])])
def test_workers_with_unequal_numbers_of_labels_equal_one(
    request: pytest.FixtureRequest, workers: str, size: int, labelled: list[int], variant: str, norm: str
) -> None:
    pool: Pool = request.getfixturevalue(workers)
    whole = batch(torch.arange(size))
    assert [int((part.labels >= 0).sum()) for part in split_batch(whole, len(labelled))] == labelled
    info, options = TrainingInfo(size=96, epochs=3, seed=7, classes=5), VARIANTS[variant]
    build = partial(build_method, ClusteringLocality, info, {"norm": norm}, 16, dtype=torch.float64, **options)
    one = assert_workers_equal_one(pool, build, whole, loss_rtol=1e-8, atol=1e-12)
    assert all(gradient.abs().sum() > 0 for gradient in one.gradients.values())
