from functools import partial
from typing import Any

import pytest
import torch

from firstlight.tasks.learner import Batch
from firstlight.tasks.pretrain import METHODS, batch_requirements, default_views, metric_plots
from firstlight.tasks.pretrain.fixmatch import FixMatch
from firstlight.tasks.pretrain.method import BatchRequirements, TrainingInfo
from tests.support import gradient_cache
from tests.support import references_semi as references
from tests.support.batches import image_batch, unevenly_labelled
from tests.support.gloo import Pool
from tests.support.learners import build_method
from tests.support.two_workers import assert_workers_equal_one, split_batch, take_steps

batch = partial(image_batch, dtype=torch.float64, views=2, labels=unevenly_labelled)

# Thresholds that some of an untrained network's predictions of five classes reach, and others do not.
VARIANTS: dict[str, dict[str, Any]] = {
    "fixed": {"cutoff": 0.8},
    "flexible": {"threshold": "flexible", "cutoff": 0.8},
    "flexible without warm-up": {"threshold": "flexible", "cutoff": 0.8, "warmup": False, "mapping": "linear"},
    "free": {"threshold": "free", "momentum": 0.5, "fairness": 0.7},
    "free without fairness": {"threshold": "free", "momentum": 0.5, "fairness": 0.0},
}
TRUTH = torch.arange(96) % 5


def method(norm: str = "group", dtype: torch.dtype = torch.float64, classes: int = 5, **options: Any) -> FixMatch:
    info = TrainingInfo(size=96, epochs=3, seed=7, classes=classes, labels=TRUTH)
    learner = build_method(FixMatch, info, {"norm": norm}, dtype=dtype, **options)
    # The weights are larger than those of a fresh classifier, so that predictions differ in their confidence.
    torch.nn.init.normal_(learner.classifier.weight, std=2.0, generator=torch.Generator().manual_seed(1))
    return learner


@pytest.mark.parametrize("size", [4, 20])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_loss_is_that_of_fixmatch(size: int, weight: float) -> None:
    learner, seen = method(cutoff=0.8, consistency_weight=weight), batch(torch.arange(size))
    told = {name: float(value.detach()) for name, value in learner(seen).items()}
    weak, strong = (output.detach().softmax(1) for output in learner.embed(seen))
    supervised, consistency, mask = references.fixmatch_losses(weak, strong, seen.labels.tolist(), [0.8] * 5)
    assert told["cross_entropy"] == pytest.approx(supervised, rel=1e-10)
    assert told["consistency"] == pytest.approx(consistency, rel=1e-10)
    assert told["loss"] == pytest.approx(supervised + weight * consistency, rel=1e-10)
    assert told["mask"] == pytest.approx(mask, rel=1e-6)
    if size == 20:
        assert 0.0 < mask < 1.0, "both kinds are there"
    taken = [b for b in range(size) if seen.labels[b] < 0 and float(weak[b].max()) >= 0.8]
    right = sum(int(weak[b].argmax()) == int(TRUTH[b]) for b in taken)
    assert told["pseudo_accuracy"] == pytest.approx(right / max(len(taken), 1), rel=1e-6)
    assert told["classes_used"] == len({int(weak[b].argmax()) for b in taken})


def test_free_adds_the_weighted_fairness_loss_and_flexible_and_free_tell_their_thresholds() -> None:
    seen = batch(torch.arange(20))
    told = method(**VARIANTS["free"])(seen)
    terms = told["cross_entropy"] + told["consistency"] + 0.7 * told["fairness"]
    torch.testing.assert_close(told["loss"], terms, rtol=1e-12, atol=0)
    assert float(told["fairness"].detach()) < 0.0
    assert "fairness" not in method(**VARIANTS["free without fairness"])(seen)
    assert 0.0 < float(told["threshold_min"]) < float(told["threshold_mean"]) < 1.0
    flexible = method(**VARIANTS["flexible"])(seen)
    assert float(flexible["threshold_mean"]) == 0.0, "before any prediction was confident"
    assert "threshold_mean" not in method(**VARIANTS["fixed"])(seen)


def test_no_gradient_flows_through_pseudo_labels_nor_from_withheld_labels() -> None:
    learner, seen = method(cutoff=0.8), batch(torch.arange(20))
    weak, strong = (output.detach().requires_grad_() for output in learner.embed(seen))
    learner.loss((weak, strong), seen)["loss"].backward()
    unlabelled = seen.labels < 0
    assert weak.grad is not None
    assert strong.grad is not None
    assert not weak.grad[unlabelled].any()
    assert weak.grad[~unlabelled].any(1).all()
    assert not strong.grad[~unlabelled].any()
    assert strong.grad[unlabelled].any()
    learner.truth = (TRUTH + 1) % 5
    again = learner(seen)
    assert torch.equal(again["loss"], method(cutoff=0.8)(seen)["loss"])


def test_both_views_pass_the_network_as_one_batch() -> None:
    """Batch statistics are those of all images of a step."""
    learner, seen = method(norm="batch").train(), batch(torch.arange(6))
    weak, strong = learner.embed(seen)
    both = learner.classify(torch.cat(seen.views))
    torch.testing.assert_close(torch.cat((weak, strong)), both, rtol=1e-12, atol=0)
    assert not torch.allclose(weak, learner.classify(seen.views[0]))


def test_views_of_two_sizes_pass_the_network_one_after_the_other() -> None:
    small, large = (image_batch(torch.arange(4), size=size, dtype=torch.float64) for size in (8, 12))
    learner = method()
    seen = Batch(small.ids, small.rows, small.labels, (large.views[0], small.views[0]), small.passes)
    weak, strong = learner.embed(seen)
    assert torch.equal(weak, learner.classify(large.views[0]))
    assert torch.equal(strong, learner.classify(small.views[0]))


def test_strong_views_are_the_weak_ones_with_rand_augment_and_cutout() -> None:
    weak, strong = default_views("fixmatch", ({"op": "horizontal_flip"},), 32, {})
    assert (weak.count, weak.size, weak.augment) == (1, 32, ({"op": "horizontal_flip"},))
    assert (strong.count, strong.size) == (1, 32)
    assert [op["op"] for op in strong.augment] == ["horizontal_flip", "rand_augment", "cutout"]
    assert batch_requirements("fixmatch", {}) == BatchRequirements(views=2, labels=True)
    assert METHODS["fixmatch"] is FixMatch


def test_plots_show_the_quality_of_pseudo_labels() -> None:
    told = method(cutoff=0.8)(batch(torch.arange(20)))
    plots = metric_plots("fixmatch", 5, {})
    assert {plot.name for plot in plots} == {"pseudo_labels", "pseudo_classes"}
    assert {name for plot in plots for name in plot.numbers} <= set(told)


def test_prediction_is_that_of_the_classifier() -> None:
    learner, seen = method().eval(), batch(torch.arange(6))
    found = learner.predict(seen.views[0])
    assert found is not None
    assert torch.equal(found, learner.embed(seen)[0].argmax(1))


def test_data_without_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^threshold: 'free' is of classes, and the data set has 0"):
        method(classes=0, threshold="free")
    with pytest.raises(ValueError, match=r"^pool: 'cls' needs a class token"):
        method(pool="cls")


@pytest.mark.parametrize("variant", VARIANTS)
def test_labelled_images_alone_have_the_supervised_loss(variant: str) -> None:
    seen = image_batch(torch.arange(6), views=2, dtype=torch.float64, labels=torch.arange(6) % 5)
    told = method(**VARIANTS[variant])(seen)
    assert torch.equal(told["loss"], told["cross_entropy"])
    assert float(told["mask"]) == float(told["pseudo_accuracy"]) == float(told["classes_used"]) == 0.0


def test_the_step_is_in_single_precision_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        told = method(dtype=torch.float32, **VARIANTS["free"])(batch(torch.arange(12), dtype=torch.float32))
    assert {value.dtype for value in told.values()} == {torch.float32}


@pytest.mark.parametrize("variant", VARIANTS)
def test_constant_and_equal_images_have_finite_losses(variant: str) -> None:
    learner = method(dtype=torch.float32, **VARIANTS[variant])
    rows = torch.arange(8)
    seen = Batch(rows, rows, unevenly_labelled(rows), (torch.zeros(8, 3, 8, 8),) * 2, torch.zeros_like(rows))
    told = learner(seen)
    told["loss"].backward()
    assert all(torch.isfinite(value) for value in told.values())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in learner.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_embedded_in_parts_has_gradient_of_whole(variant: str) -> None:
    gradient_cache.assert_parts_equal_whole(
        method(**VARIANTS[variant]), method(**VARIANTS[variant]), batch(torch.arange(24)), 8
    )


@pytest.mark.parametrize("variant", ["fixed", "flexible", "free"])
@pytest.mark.parametrize(
    ("workers", "size", "labelled", "norm"), [("pool", 64, [6, 4], "sync"), ("pool3", 48, [6, 0, 4], "group")]
)
def test_workers_with_unequal_numbers_of_labels_equal_one(
    request: pytest.FixtureRequest, workers: str, size: int, labelled: list[int], norm: str, variant: str
) -> None:
    """Two steps: the second is judged by what the first has left in tables and averages."""
    pool: Pool = request.getfixturevalue(workers)
    steps = [batch(torch.arange(size)), batch(torch.arange(size).flip(0) + 96 - size)]
    assert [int((part.labels >= 0).sum()) for part in split_batch(steps[0], len(labelled))] == labelled
    one = assert_workers_equal_one(pool, partial(method, norm, **VARIANTS[variant]), *steps, loss_rtol=1e-8)
    assert all(gradient.abs().sum() > 0 for gradient in one.gradients.values())
    assert float(one.losses["mask"]) > 0.0
    assert variant == "flexible" or float(one.losses["mask"]) < 1.0
    if variant != "fixed":
        first = take_steps(partial(method, norm, **VARIANTS[variant]), steps[1:])
        assert float(first.losses["threshold_mean"]) != float(one.losses["threshold_mean"]), "the state matters"
