"""The costs that solvers are compared on are those of a trained network, and the comparison measures what it says."""

import pytest
import torch
import torch.nn.functional as F

from bench import assignment as bench
from firstlight.tasks.assignment import SPARSE_TOLERANCE, best_assignment


def drawn(count: int, seed: int = 0) -> torch.Tensor:
    return bench.draw_digit_images(count, torch.Generator().manual_seed(seed))


def test_digits_are_drawn_at_random_in_one_way() -> None:
    images = drawn(40)
    assert images.shape == (40, 3, bench.DIGIT_SIZE, bench.DIGIT_SIZE)
    assert 0 <= images.min() < 0.1
    assert 0.7 < images.max() <= 1
    assert (images.flatten(1).std(1) > 0.05).all(), "no digit is outside of its image"
    assert torch.equal(images, drawn(40))
    assert not torch.equal(images, drawn(40, 1))


def test_training_brings_images_nearer_to_the_targets_they_hold() -> None:
    training = bench.DigitTraining(drawn(256), 32, epochs=30)
    before = F.cosine_similarity(*training.read_pairs()).mean()
    training.train()
    features, targets = training.read_pairs()
    assert F.cosine_similarity(features, targets).mean() > before + 0.1
    assert torch.allclose(features.norm(dim=1), torch.ones(256), atol=1e-5)


def test_comparison_has_the_cosines_of_both_solvers(monkeypatch: pytest.MonkeyPatch) -> None:
    features, targets = bench.DigitTraining(drawn(512), 32).read_pairs()
    targets = targets[best_assignment(features[:300], targets[:300])].repeat(2, 1)[:300]
    features = features[:300]
    found = bench.compare_solvers(features, targets.roll(7, 0), 1)
    assert found.best_cosine >= found.sparse_cosine > found.held_cosine
    assert 0 <= found.gap <= SPARSE_TOLERANCE
    assert 0 <= found.lost_share < 0.05
    assert min(found.exact_seconds, found.sparse_seconds) > 0
    monkeypatch.setattr(bench, "sparse_assignment", lambda f, t: torch.arange(len(f)))
    assert bench.compare_solvers(features, targets.roll(7, 0), 1).lost_share == pytest.approx(1.0)


def test_every_dimension_is_compared_before_and_after_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TARGET_DIMS", (8, 16))
    monkeypatch.setattr(bench, "ASSIGNMENT_BATCHES", (32, 64))
    monkeypatch.setattr(bench, "DIGIT_EPOCHS", 1)
    names = [name for name, _ in bench.list_comparisons(drawn(256))]
    assert len(set(names)) == 8
    assert names[2] == "32 images, 8 dimensions, trained"
