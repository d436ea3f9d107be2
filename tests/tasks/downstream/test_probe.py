import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from firstlight.tasks.downstream import probe as probe_module
from firstlight.tasks.downstream.probe import Probe, choose_probe, fit_probe


def blobs(n: int, d: int = 6, classes: int = 3, seed: int = 0, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """(n, d) float64 features of very different scales around class centres that every seed shares, and (n,) labels."""
    centres = np.random.default_rng(1).normal(size=(classes, d))
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    features = (centres[labels] + noise * rng.normal(size=(n, d))) * np.logspace(-2, 2, d) + 5
    return torch.from_numpy(features), torch.from_numpy(labels)


@pytest.mark.parametrize("decay", [1e-3, 1e-2, 1.0])
def test_probe_equals_scikit_learns_on_standardised_features(decay: float) -> None:
    features, labels = blobs(200)
    fitted = fit_probe(features, labels, 3, decay)
    x = features.numpy()
    x = (x - x.mean(0)) / x.std(0, ddof=1)
    reference = LogisticRegression(C=1 / (decay * len(x)), tol=1e-10, max_iter=10_000).fit(x, labels.numpy())
    logits = torch.nn.functional.linear((features - fitted.mean) / fitted.std, fitted.weight, fitted.bias)
    np.testing.assert_allclose(logits.softmax(1).numpy(), reference.predict_proba(x), atol=1e-4)
    np.testing.assert_allclose(fitted.weight.numpy(), reference.coef_, atol=1e-3)
    assert fitted.predict(features).tolist() == reference.predict(x).tolist()


def test_bias_is_not_decayed() -> None:
    labels = (torch.arange(100) < 90).long()
    fitted = fit_probe(torch.randn(100, 2, dtype=torch.float64), labels, 2, 1e6)
    assert fitted.weight.abs().max() < 1e-3
    assert float(fitted.bias.softmax(0)[1]) == pytest.approx(0.9, abs=1e-3)


def test_class_without_images_is_not_predicted() -> None:
    features, labels = blobs(100)
    assert set(fit_probe(features, labels, 7, 1e-3).predict(features).tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("value", [0.0, 0.1, 100.1, 1e6])
def test_constant_feature_has_no_effect(value: float) -> None:
    """In float32 the mean of a constant column is not exactly the constant.

    A unit that is dead in training may be active in the test.
    """
    features, labels = (t.float() if t.is_floating_point() else t for t in blobs(300))
    without = fit_probe(features, labels, 3, 1e-3)
    fitted = fit_probe(torch.cat((features, torch.full((300, 1), value)), 1), labels, 3, 1e-3)
    assert torch.isfinite(fitted.weight).all()
    torch.testing.assert_close(fitted.weight[:, :-1], without.weight, rtol=0, atol=2e-2)
    awake = torch.cat((features, torch.full((300, 1), value + 0.5)), 1)
    same = (fitted.predict(awake) == without.predict(features)).double().mean()
    assert float(same) > 0.98


def test_probe_with_best_held_out_accuracy_is_chosen() -> None:
    train, held_out = blobs(40, noise=2.0), blobs(400, seed=5, noise=2.0)
    decays = (1e-6, 1e-2, 1e-1, 100.0)
    accuracies = {
        d: float((fit_probe(*train, 3, d).predict(held_out[0]) == held_out[1]).double().mean()) for d in decays
    }
    best = max(accuracies.values())
    assert sorted(accuracies.values())[-2] < best, "the example has a tie"
    fitted, decay = choose_probe(train, held_out, 3, decays)
    assert accuracies[decay] == best
    assert torch.equal(fitted.weight, fit_probe(*train, 3, decay).weight)


@pytest.mark.parametrize("decays", [(0.1, 10.0, 1.0), (10.0, 1.0, 0.1), (0.1, 1.0, 10.0)])
def test_ties_go_to_the_larger_decay(monkeypatch: pytest.MonkeyPatch, decays: tuple[float, ...]) -> None:
    """A probe of decay 10 is wrong, those of 1 and 0.1 are right on all held-out images."""

    def fit(features: Tensor, labels: Tensor, classes: int, weight_decay: float) -> Probe:
        bias = torch.tensor([1.0, 0.0]) if weight_decay == 10 else torch.tensor([0.0, 1.0])
        return Probe(torch.zeros(1), torch.ones(1), torch.zeros(2, 1), bias)

    monkeypatch.setattr(probe_module, "fit_probe", fit)
    held_out = (torch.zeros(4, 1), torch.ones(4).long())
    assert choose_probe(held_out, held_out, 2, decays)[1] == 1.0
