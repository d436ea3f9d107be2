import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from firstlight.tasks import feature_metrics as module
from firstlight.tasks.feature_metrics import (
    alignment,
    compute_feature_metrics,
    dead_dimensions,
    describe_collapse,
    feature_std,
    rankme,
    uniformity,
)


def random(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def unit(rows: list[list[float]]) -> list[list[float]]:
    return [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in rows]


def naive_uniformity(rows: list[list[float]]) -> float:
    pairs = [sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for x, y in itertools.combinations(unit(rows), 2)]
    return math.log(sum(math.exp(-2 * distance) for distance in pairs) / len(pairs))


def naive_rank(features: np.ndarray) -> float:
    singular = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    p = singular / singular.sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


@given(st.integers(2, 20), st.integers(1, 8), st.integers(0, 1000))
def test_metrics_equal_their_formulas(n: int, d: int, seed: int) -> None:
    x, y = random(n, d, seed), random(n, d, seed + 1)
    rows, others = unit(x.double().tolist()), unit(y.double().tolist())
    assert rankme(x) == pytest.approx(naive_rank(x.numpy()), rel=1e-5)
    assert uniformity(x) == pytest.approx(naive_uniformity(x.double().tolist()), abs=1e-6)
    expected = sum(sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for p, q in zip(rows, others, strict=True)) / n
    assert alignment(x, y) == pytest.approx(expected, abs=1e-9)
    assert feature_std(x) == pytest.approx(np.array(rows).std(0).mean(), abs=1e-9)


def test_uniformity_in_blocks_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(60, 5)
    whole = uniformity(x)
    monkeypatch.setattr(module, "UNIFORMITY_BLOCK", 7)
    assert uniformity(x) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("limit", ["MAX_EIGENVALUE_SIDE", "MAX_UNIFORMITY_IMAGES"])
def test_metrics_of_many_images_take_evenly_spaced_ones(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    x = random(101, 40)
    monkeypatch.setattr(module, limit, 11)
    some = x[::10]
    assert rankme(x) == pytest.approx(naive_rank((some if limit == "MAX_EIGENVALUE_SIDE" else x).numpy()), rel=1e-5)
    assert uniformity(x) == pytest.approx(
        naive_uniformity((some if limit == "MAX_UNIFORMITY_IMAGES" else x).tolist()), rel=1e-4
    )


def test_metrics_of_evenly_spread_features() -> None:
    x = random(4000, 16)
    assert rankme(x) == pytest.approx(16, abs=0.1)
    assert feature_std(x) == pytest.approx(16**-0.5, rel=0.02)
    assert dead_dimensions(x) == 0
    assert describe_collapse(compute_feature_metrics(x), 16) is None


@pytest.mark.parametrize("noise", [0.0, 1e-5])
def test_features_at_one_point_are_collapsed(noise: float) -> None:
    x = torch.ones(50, 16) * 3 + noise * random(50, 16)
    found = compute_feature_metrics(x)
    assert found["rankme"] == pytest.approx(1, abs=0.01)
    assert found["uniformity"] == pytest.approx(0, abs=1e-6)
    assert "effective rank is 1.00 of 16" in str(describe_collapse(found, 16))


def test_tiny_deviation_is_a_collapse_at_any_rank() -> None:
    assert "standard deviation is 4.0%" in str(describe_collapse({"rankme": 3.0, "feature_std": 0.01}, 16))
    assert describe_collapse({"rankme": 3.0, "feature_std": 0.0126}, 16) is None


def test_constant_dimensions_are_dead() -> None:
    x = random(50, 8)
    x[:, 3], x[:, 5] = 0.0, 100.1
    assert dead_dimensions(x) == 0.25


def test_dead_network_has_collapsed_metrics() -> None:
    found = compute_feature_metrics(torch.zeros(20, 4))
    assert all(math.isfinite(value) for value in found.values())
    assert found["dead_dimensions"] == 1
    assert describe_collapse(found, 4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_features_have_no_metrics(value: float) -> None:
    x = random(20, 4)
    x[3, 2] = value
    assert compute_feature_metrics(x) == {}


def test_one_image_has_no_pairs() -> None:
    assert uniformity(random(1, 4)) == 0.0
